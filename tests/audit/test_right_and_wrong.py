"""What people write, right and wrong: no right rule fails, and what fails says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import normal


def made(primal, forward, backward):
    function = jax.custom_vjp(primal)
    function.defvjp(forward, backward)
    return function


def audit(function, *args, **given):
    return bh.check(function, *args, costs=False, **given)


def messages(found):
    return [finding.message for finding in found.failures]


def test_a_bias_before_a_batch_norm_passes_without_a_reference():
    def loss(params, x):
        h = x @ params["w"] + params["b"][None]
        h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)
        return jnp.mean(jnp.tanh(h) ** 2)

    found = audit(loss, {"w": normal(0, 4, 8), "b": jnp.zeros(8)}, normal(1, 6, 4))
    assert found.passed, found


@pytest.mark.parametrize(
    "backward",
    [lambda _, dy: (dy, dy), lambda _, dy: (dy, dy.sum(1)), lambda _, dy: (dy, dy.sum())],
    ids=["not summed", "summed over the wrong axis", "summed over all"],
)
def test_a_cotangent_of_another_shape_is_a_finding(backward):
    add = made(lambda x, b: x + b[None], lambda x, b: (x + b[None], None), backward)
    found = audit(add, normal(0, 5, 4), normal(1, 4))
    assert {finding.path for finding in found.failures} == {"b"}
    assert any("(4,)" in message for message in messages(found))


def dropout(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0) / 0.7


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_random_draws_that_depend_on_the_dtype_do_not_hide_a_wrong_gradient(factor):
    def backward(key, dy):
        dx = dropout(dy, key)
        return dx * factor if dy.dtype == jnp.float32 else dx, None

    rule = made(dropout, lambda x, key: (dropout(x, key), key), backward)
    found = audit(rule, normal(0, 8, 5), jax.random.key(3))
    assert found.passed == (factor == 1.0), found
    assert any("random numbers" in finding.message for finding in found.findings)


def product(factor, sums_in=jnp.float32):
    def backward(saved, dy):
        x, w = saved
        dx = jnp.dot(dy, w.T, preferred_element_type=sums_in).astype(x.dtype)
        dw = jnp.dot(x.T, dy, preferred_element_type=sums_in).astype(w.dtype)
        return dx * jnp.asarray(factor, dx.dtype), dw

    return made(lambda x, w: x @ w, lambda x, w: (x @ w, (x, w)), backward)


def test_a_rule_that_sums_in_float32_is_judged_in_float32():
    x, w = normal(0, 8, 6), normal(1, 6, 5)
    found = audit(product(1.0), x, w)
    assert found.passed, found
    assert any("computes in float32" in finding.message for finding in found.findings)
    assert not audit(product(1.01), x, w).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_where_there_is_no_slope_none_is_asked_for(value):
    x = jnp.abs(normal(0, 7)).at[2].set(value)
    root = made(jnp.sqrt, lambda x: (jnp.sqrt(x), x), lambda x, dy: (dy / 2 / jnp.sqrt(x),))
    found = audit(root, x, skip=["second derivative"])
    assert found.passed, found
    assert any(f.check == "taylor" and f.skipped for f in found.findings)


def test_a_rule_that_is_less_robust_against_infinity_passes_with_a_note():
    def backward(x, dy):
        return (dy[:, None] * jax.nn.softmax(x),)

    log_sum = made(
        lambda x: jax.nn.logsumexp(x, -1), lambda x: (jax.nn.logsumexp(x, -1), x), backward
    )
    found = audit(log_sum, normal(0, 3, 4))
    assert found.passed, found
    assert any(f.check == "nonfinite" and "Inf at x[" in f.message for f in found.findings)


def test_a_wrong_reference_is_blamed_and_not_the_rule():
    x, w = normal(0, 5, 4), normal(1, 4, 3)
    found = audit(product(1.0, None), x, w, reference=lambda x, w: jax.lax.stop_gradient(x) @ w)
    assert not found.passed
    assert all("reference's" in message for message in messages(found)), messages(found)
    assert found.leaves[0].cause is None


def test_a_jitted_rule_inside_of_a_function_is_seen():
    flipped = jax.jit(made(lambda x: x * x, lambda x: (x * x, x), lambda x, dy: (-2 * x * dy,)))
    found = audit(lambda x: flipped(x), normal(0, 7))
    assert not found.passed
    assert found.leaves[0].cause.kind == "sign"


def test_checks_can_be_left_out_by_name():
    def detached(x, dy):
        return (2 * jax.lax.stop_gradient(x) * dy,)

    square = made(lambda x: x * x, lambda x: (x * x, x), detached)
    x = normal(0, 5)
    assert [f.check for f in audit(square, x).failures] == ["second derivative"]
    assert audit(square, x, skip=["second derivative"]).passed
    with pytest.raises(ValueError, match=r"no check 'second derivatives'.*did you mean"):
        audit(square, x, skip=["second derivatives"])


def test_an_argument_that_is_not_differentiated_is_held():
    """A mask has a cotangent of zero, though the loss depends on it."""

    def loss(x, mask):
        return jnp.sum(x * x * mask) / jnp.sum(mask)

    def backward(residuals, dy):
        x, mask = residuals
        return 2 * x * mask / jnp.sum(mask) * dy, None

    masked = made(loss, lambda x, mask: (loss(x, mask), (x, mask)), backward)
    given = normal(0, 5), jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])
    failed = audit(masked, *given)
    assert "if mask is not to be differentiated: hold=('mask',)" in str(failed)
    assert audit(masked, *given, hold=("mask",)).passed
    with pytest.raises(ValueError, match=r"no differentiable argument 'mast' to hold.*'mask'"):
        audit(masked, *given, hold=("mast",))
    with pytest.raises(ValueError, match="leaves nothing to differentiate"):
        audit(masked, *given, hold=("x", "mask"))


def test_a_straight_through_estimator_is_held_against_a_reference_that_is_one():
    rounds = made(lambda x: jnp.round(x), lambda x: (jnp.round(x), None), lambda _, dy: (dy,))
    x = normal(0, 5)
    assert "straight-through" in str(audit(rounds, x))

    def reference(x):
        return x + jax.lax.stop_gradient(jnp.round(x) - x)

    failed = audit(rounds, x, reference=reference)
    assert {found.check for found in failed.failures} == {"taylor"}
    assert failed.advice[0].endswith("skip=('taylor',)")
    assert audit(rounds, x, reference=reference, skip=("taylor",)).passed


def test_a_python_number_is_no_argument_to_differentiate_in():
    with pytest.raises(TypeError, match=r"jnp\.asarray\(1\.5\)"):
        audit(jnp.sin, 1.5)


def test_a_saturated_sigmoid_is_as_accurate_as_its_leaf():
    """y (1 - y) loses the digits of a slope of 1e-8: beside one of 0.25, no mistake."""
    x = 6 * normal(0, 8, 64)

    def forward(x):
        y = jax.nn.sigmoid(x)
        return y, y

    rule = made(jax.nn.sigmoid, forward, lambda y, dy: (dy * y * (1 - y),))
    found = audit(rule, x, reference=lambda x: 1 / (1 + jnp.exp(-x)))
    assert found.passed, found


def test_a_rule_in_float32_of_a_function_in_float64_is_right():
    def backward(x, dy):
        low, error = x.astype(jnp.float32), dy.astype(jnp.float32)
        return ((error * jnp.cos(low)).astype(x.dtype),)

    assert audit(made(jnp.sin, lambda x: (jnp.sin(x), x), backward), normal(0, 5, 4)).passed


def test_to_avoid_the_nan_of_autodiff_is_right():
    def norm(x):
        return jnp.sqrt(jnp.sum(x * x))

    def backward(x, dy):
        return (dy * x / jnp.maximum(norm(x), 1e-12),)

    found = audit(made(norm, lambda x: (norm(x), x), backward), jnp.zeros(4))
    assert found.passed, found
    assert any("autodiff of the reference gives NaN" in f.message for f in found.findings)


def test_residuals_that_jax_refuses_are_a_finding():
    rule = made(jnp.sin, lambda x: (jnp.sin(x), (x, "sin")), lambda r, dy: (dy * jnp.cos(r[0]),))
    (finding,) = audit(rule, normal(0, 5)).failures
    assert finding.check == "structure" and "jax.grad does not take the rule" in finding.message


def test_repeated_rows_of_a_table_add_up_under_dropout():
    def embed(table, ids, key):
        return dropout(table[ids], key)

    def backward(residuals, dy):
        table, ids, key = residuals
        return jnp.zeros_like(table).at[ids].set(dropout(dy, key)), None, None

    rule = made(embed, lambda *given: (embed(*given), given), backward)
    found = audit(rule, normal(0, 5, 3), jnp.array([0, 1, 1, 4, 2, 2]), jax.random.key(3))
    assert any(f.check == "gradient" and f.path == "table" for f in found.failures)


def test_a_kernel_without_a_reference_asks_for_one():
    def kernel(x):
        return jax.pure_callback(np.sin, x, x)

    rule = made(kernel, lambda x: (kernel(x), x), lambda x, dy: (dy * jnp.cos(x),))
    with pytest.raises(TypeError, match="give reference=plain_function"):
        audit(rule, normal(0, 4))
    assert audit(rule, normal(0, 4), reference=jnp.sin).passed


def test_a_rule_inside_of_a_function_is_audited_like_one_alone():
    def squares(x, scale):
        return scale * x * x

    inner = made(
        squares,
        lambda x, scale: (squares(x, scale), (x, scale)),
        lambda saved, dy: (4 * saved[0] * saved[1] * dy, jnp.sum(saved[0] ** 2 * dy)),
    )
    found = audit(lambda x, scale: jnp.sum(inner(jnp.tanh(x), scale)), normal(0, 5), jnp.ones(()))
    assert {f.path for f in found.failures} == {"x"}
    assert next(leaf for leaf in found.leaves if leaf.path == "x").cause.kind == "factor"


def test_the_arrays_of_a_module_are_differentiated():
    equinox = pytest.importorskip("equinox")
    module = equinox.nn.Linear(3, 2, key=jax.random.key(0))
    found = audit(module, normal(0, 3))
    assert found.passed, found
    assert {leaf.path for leaf in found.leaves} == {"weight", "bias", "x"}
