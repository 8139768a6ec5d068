"""Two functions of anyone's: a row a leaf, by the names of the arguments."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import backhand as bh
from tests.support import labels, normal, spread

X, Y = normal(0, 4, 3), normal(1, 4, 3)


def paths(report):
    return [row.path for row in report.rows]


def wrong(report):
    return [row.path for row in report.rows if not row.agrees]


def product(factor=1.0, mean=False):
    @jax.custom_vjp
    def product(x, y):
        return x * y

    def backward(saved, dy):
        x, y = saved
        return dy * y, factor * dy * x

    product.defvjp(lambda x, y: (x * y, (x, y)), backward)
    return product


def test_a_custom_rule_is_compared_with_a_plain_function():
    assert bh.compare(product(), jnp.multiply, X, Y).agrees
    report = bh.compare(product(1.001), jnp.multiply, X, Y)
    assert wrong(report) == ["y"]
    assert report.rows[1].gradients[0].shape == (3, 4, 3)
    assert report.rows[1].norm_ratio == pytest.approx(1.001, rel=1e-4)


def test_one_wrong_element_is_located():
    def loss(x):
        return jnp.sum(x**2)

    def other(x):
        return loss(x) + 1e-3 * x[2, 1]

    report = bh.compare(loss, other, X, returns="value")
    assert (wrong(report), report.rows[0].where) == (["x"], (2, 1))


def test_outputs_are_compared_element_by_element():
    report = bh.compare(lambda x: x, lambda x: x + 1, X)
    assert not wrong(report)
    assert not report.agrees
    assert "the outputs DIFFER" in str(report)
    assert "the values DIFFER" in str(bh.compare(jnp.sum, lambda x: 1 + jnp.sum(x), X))


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_flax_loss_beside_a_plain_one(factor):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def plain(model, x):
        return factor * jnp.sum((x @ model.kernel[...] + model.bias[...][None]) ** 2)

    def own(model, x):
        return jnp.sum((x @ model.kernel[...] + model.bias[...][None]) ** 2)

    report = bh.compare(own, plain, model, X)
    assert report.agrees == (factor == 1)
    assert paths(report) == ["model/bias/value", "model/kernel/value", "x"]
    state = bh.compare(
        nnx.grad(own), lambda model, x: own(model, x), model, X, returns=("gradient", "value")
    )
    assert state.agrees
    assert paths(state) == ["model/bias/value", "model/kernel/value"]


def test_an_equinox_loss_whose_module_holds_functions():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))

    def loss(model, x):
        return jnp.sum(jax.vmap(model)(x) ** 2)

    assert bh.compare(loss, lambda model, x: loss(model, x), model, X).agrees
    twice = bh.compare(loss, lambda model, x: 2 * loss(model, x), model, X)
    assert wrong(twice) == paths(twice)
    grads = bh.compare(eqx.filter_grad(loss), eqx.filter_grad(loss), model, X, returns="gradient")
    assert grads.agrees
    assert "m/layers/0/weight".replace("m/", "model/") in paths(grads)


def test_functions_that_return_gradients_or_both():
    loss = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
    batch = {"inputs": X, "targets": labels(0, 3, 4)}
    params = spread(loss.init(jax.random.key(0), batch))
    both = bh.compare(
        bh.value_and_grad(loss),
        jax.value_and_grad(loss),
        params,
        batch,
        returns="value and gradient",
    )
    assert both.agrees
    assert both.values[0] == pytest.approx(float(loss(params, batch)))
    mixed = bh.compare(bh.grad(loss), loss.__call__, params, batch, returns=("gradient", "value"))
    assert mixed.agrees
    assert paths(mixed) == ["params/b", "params/w"]


def test_a_layer_and_an_op_are_compared_by_their_rules():
    layer = bh.layer_norm()
    params = {"scale": normal(2, 3), "offset": normal(3, 3)}
    reference = bh.ops.layer_norm.reference
    by_layer = bh.compare(layer, lambda p, x: reference(x, p["scale"], p["offset"]), params, X)
    assert by_layer.agrees
    by_op = bh.compare(bh.ops.layer_norm, reference, X, params["scale"], params["offset"])
    assert by_op.agrees
    assert paths(by_op) == ["x", "scale", "offset"]


def test_a_gradient_that_is_zero_but_for_rounding_is_settled_in_float64():
    def normed(x, bias):
        x = x + bias[None]
        return jnp.mean((x - x.mean(0, keepdims=True)) ** 2 * Y)

    def other(x, bias):
        x = (x + bias[None]) * 3
        return jnp.mean((x - x.mean(0, keepdims=True)) ** 2 * Y) / 9

    report = bh.compare(normed, other, X, normal(4, 3))
    assert report.agrees, str(report)
    off = bh.compare(normed, lambda x, bias: other(x, bias) + 1e-5 * bias.sum(), X, normal(4, 3))
    assert wrong(off) == ["bias"]


def test_float64_sees_a_billionth(x64):
    x = jnp.asarray(np.asarray(X, np.float64))
    assert bh.compare(jnp.tanh, lambda x: jnp.sinh(x) / jnp.cosh(x), x).agrees
    slightly = bh.compare(lambda x: (1 + 1e-9) * jnp.tanh(x), jnp.tanh, x)
    assert wrong(slightly) == ["x"]


def test_another_tolerance_is_the_callers():
    def doubled(x):
        return 1.01 * jnp.sum(x**2)

    assert not bh.compare(doubled, lambda x: jnp.sum(x**2), X).agrees
    assert bh.compare(doubled, lambda x: jnp.sum(x**2), X, rtol=0.05).agrees


def test_what_comes_beside_a_value_is_left_out():
    def loss(x):
        return jnp.sum(x**2)

    def aided(x):
        return loss(x), {"mean": x.mean()}

    ways = (jax.value_and_grad(aided, has_aux=True), jax.grad(aided, has_aux=True))
    assert bh.compare(*ways, X, returns=("value and gradient", "gradient")).agrees


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_gradient_in_numpy_is_compared(factor):
    def loss(params, x):
        return jnp.mean(jax.nn.relu(x @ params["w"]) ** 2)

    def by_hand(params, x):
        h = np.matmul(x, params["w"])
        h[h < 0] = 0
        return {"w": factor * x.T @ (2 * h / h.size)}

    report = bh.compare(by_hand, loss, {"w": Y.T}, X, returns=("gradient", "value"))
    assert report.agrees == (factor == 1.0)


def test_a_kink_is_named_in_a_comparison():
    x = X.at[1, 2].set(0).at[3, 0].set(0)
    report = bh.compare(lambda x: jnp.maximum(x, 0), jax.nn.relu, x)
    assert report.rows[0].cause.message == "differs only where `x` is 0: a kink"


def test_bad_input_is_one_sentence_before_anything_compiles(unchecked, nothing_compiles):
    def refused(error, match, *args, **settings):
        with pytest.raises(error, match=match) as caught:
            bh.compare(*args, **settings)
        assert "\n" not in str(caught.value)
        return caught.value

    with nothing_compiles():
        refused(TypeError, "is a Python list of numbers", jnp.sin, jnp.cos, [1.0, 2.0])
        refused(ValueError, "same tree and shapes", lambda x: x, lambda x: (x, x), X)
        refused(TypeError, "does not take 1 argument", lambda x: x, lambda x, y: x, X)
        refused(TypeError, "integers, booleans and keys", jnp.sin, jnp.sin, labels(0, 3, 4))
        refused(
            ValueError,
            "must give a scalar",
            lambda x: x,
            jax.grad(jnp.sum),
            X,
            returns=("value", "gradient"),
        )
        error = refused(
            TypeError, "tree and the shapes of", jnp.sum, jnp.sum, X, returns="gradient"
        )
        assert isinstance(error.__context__, ValueError)
        refused(TypeError, "must return a pair", jnp.sin, jnp.sin, X, returns="value and gradient")
        refused(TypeError, "complex64", jnp.fft.fft, jnp.fft.fft, X)
        tree = {"w": X}
        grad = jax.grad(lambda tree: jnp.sum(tree["w"] ** 2))
        refused(ValueError, 'say returns="gradient"', grad, grad, tree)
        refused(
            TypeError,
            r"first argument, w \(4, 3\); got v \(4, 3\)",
            lambda tree: {"v": tree["w"]},
            grad,
            tree,
            returns="gradient",
        )
        callback = refused(
            TypeError,
            "not differentiable",
            lambda x: jax.pure_callback(np.sin, x, x),
            jnp.sin,
            X,
        )
        assert "Pure callbacks" in str(callback.__context__)


def test_ways_that_are_not_pure_are_refused(unchecked):
    calls, kept, x = [], [], jnp.arange(1.0, 5.0)

    def counted(x):
        calls.append(1)
        return jnp.sum(x**2) * len(calls)

    def keeping(x):
        kept.append(x)
        return jnp.sum(x**2)

    for impure, what in (
        (counted, "counted is not pure: two calls"),
        (keeping, "keeping has a si"),
    ):
        with pytest.raises(TypeError, match=what):
            bh.compare(impure, lambda x: jnp.sum(x * x), x)


def test_a_call_that_fails_on_the_host_is_one_sentence(unchecked):
    def fails(x):
        return jnp.sum(jax.pure_callback(lambda x: x[:1], x, x))

    rule = jax.custom_vjp(fails)
    rule.defvjp(lambda x: (fails(x), x), lambda x, dy: (dy * x,))
    with pytest.raises(TypeError, match=r"^fails or sum calls a function on the host that fails"):
        bh.compare(rule, jnp.sum, jnp.arange(1.0, 5.0))
