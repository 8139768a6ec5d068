"""Output layer and cross-entropy in one: what the two give apart, in any number of chunks."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import backhand as bh
from tests.conformance.checks import both_sides
from tests.support import assert_close, labels, normal, temporary_bytes

FUSED = bh.losses.linear_cross_entropy
APART = bh.losses.softmax_cross_entropy
B, T, D, V = 3, 4, 5, 7


def problem():
    return normal(0, B, T, D), normal(1, D, V), labels(2, V, B, T)


def both_ways(op, *arrays):
    """(sum, weight) and the errors of x and w for an error of the sum of 0.5."""
    y, residuals = op.forward(*arrays)
    dx, dw, *_ = op.cotangents(residuals, (jnp.full_like(y[0], 0.5), jnp.zeros_like(y[1])))
    return y, dx, dw


def apart(x, w, targets, weights=None):
    """The same by the two ops that it stands for."""
    logits, of_linear = bh.ops.linear.forward(x, w)
    y, residuals = APART.forward(logits, targets, weights)
    dlogits = APART.backward(residuals, (jnp.full_like(y[0], 0.5), jnp.zeros_like(y[1])))[0]
    dx, dw, _ = bh.ops.linear.backward(of_linear, dlogits)
    return y, dx, dw


@pytest.mark.parametrize("rows", [None, 1, 4, 5, 11, 12, 100])
def test_any_number_of_rows_at_a_time_gives_what_the_two_give_apart(x64, rows):
    x, w, targets = problem()
    weights = jnp.asarray([1.0, 0.0, 2.0])
    expected = apart(x, w, targets, weights)
    assert_close(both_ways(FUSED.bind(rows=rows), x, w, targets, weights), expected)
    y, dx, dw = both_ways(FUSED.bind(rows=rows, tied=True), x, w.T, targets, weights)
    assert_close((y, dx, dw.T), expected)


def test_it_is_what_optax_has(x64):
    x, w, targets = problem()
    theirs = optax.softmax_cross_entropy_with_integer_labels(x @ w, targets).sum()
    assert_close(FUSED(x, w, targets), (theirs, jnp.asarray(12.0)))
    smooth = optax.smooth_labels(jax.nn.one_hot(targets, V, dtype=x.dtype), 0.3)
    theirs = optax.softmax_cross_entropy(x @ w, smooth).sum()
    assert_close(FUSED(x, w, targets, label_smoothing=0.3, rows=5)[0], theirs)


VALUES = st.sampled_from([-30.0, -1.0, 0.0, 0.5, 3.0])
ERRORS = st.sampled_from([-2.0, 0.0, 0.5])


@given(
    st.lists(VALUES, min_size=B * T * D, max_size=B * T * D),
    st.lists(st.integers(0, V - 1), min_size=B * T, max_size=B * T),
    st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=B * T, max_size=B * T),
    st.sampled_from(
        [
            {},
            {"z_loss": 0.1},
            {"soft_cap": 2.0, "label_smoothing": 0.2},
            {"soft_cap": 2.0, "z_loss": 0.1, "rows": 5, "tied": True},
            {"label_smoothing": 1.0, "rows": 4, "tied": True},
            {"rows": 7},
        ]
    ),
    st.tuples(ERRORS, ERRORS),
)
@settings(max_examples=200, deadline=None)
def test_values_and_errors_are_the_references(x, targets, weights, options, dy):
    with jax.enable_x64(True):
        arrays = (
            jnp.asarray(x).reshape(B, T, D),
            normal(1, V, D) if options.get("tied") else normal(1, D, V),
            jnp.asarray(targets, jnp.int32).reshape(B, T),
            jnp.asarray(weights).reshape(B, T),
        )
        ours, theirs = compiled(tuple(options.items()))(arrays, jax.tree.map(jnp.asarray, dy))
        assert_close(ours, theirs, floor=1e-12)


@functools.cache
def compiled(options):
    """Both sides of one setting."""
    return jax.jit(functools.partial(both_sides, FUSED.bind(**dict(options))))


@pytest.mark.parametrize("rows", [None, 2])
def test_a_position_of_weight_zero_is_left_out_whatever_is_in_it(x64, rows):
    x, w, targets = problem()
    weights = jnp.ones((B, T)).at[1, 2].set(0)
    clean = both_ways(FUSED.bind(rows=rows), x, w, targets, weights)
    for sick in (jnp.nan, jnp.inf):
        broken = x.at[1, 2, 0].set(sick), w, targets.at[1, 2].set(-100), weights
        found = both_ways(FUSED.bind(rows=rows), *broken)
        assert_close(found, clean)
    assert not clean[1][1, 2].any()


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("label", [-1, V, 2**31 - 1])
def test_a_label_that_does_not_exist_is_noticed_and_gives_no_blame(rows, label):
    x, w, targets = problem()
    y, dx, dw = both_ways(FUSED.bind(rows=rows), x, w, targets.at[1, 2].set(label))
    assert np.isnan(y[0]) and np.isfinite(dx).all() and np.isfinite(dw).all()
    assert not dx[1, 2].any()


def test_no_logit_exceeds_the_soft_cap_and_its_slope_ends_there(x64):
    x, w = jnp.full((1, 1), 1e3), jnp.asarray([[1.0, -1.0]])
    (total, _), dx, _ = both_ways(FUSED.bind(soft_cap=3.0), x, w, jnp.asarray([1]))
    assert float(total) == pytest.approx(np.log1p(np.exp(6.0)))
    assert float(dx[0, 0]) == 0


def test_many_logits_are_never_there_at_once():
    """Nor any gradient where only the loss is asked for."""
    rows, features, vocabulary = 4096, 16, 8192
    x, w = normal(0, rows, features), normal(1, features, vocabulary)
    targets = labels(2, vocabulary, rows)
    whole = 4 * rows * vocabulary

    def both(x, w):
        return jax.value_and_grad(lambda x, w: FUSED(x, w, targets)[0], (0, 1))(x, w)

    assert temporary_bytes(both, x, w) < whole / 3
    chunk = 4 * 512 * vocabulary
    small = 4 * (w.size + x.size) / 2
    loss = temporary_bytes(lambda x, w: FUSED(x, w, targets)[0], x, w)
    assert loss < chunk + small < temporary_bytes(both, x, w)


def test_only_the_loss_is_one_product_for_each_chunk():
    x, w, targets = normal(0, 8, 4), normal(1, 4, 6), labels(2, 6, 8)
    loss = jax.jit(lambda x, w: FUSED(x, w, targets, rows=2)[0])
    text = loss.lower(x, w).compile().as_text()
    both = jax.jit(jax.grad(lambda x, w: FUSED(x, w, targets, rows=2)[0], (0, 1)))
    assert text.count(" dot(") == 1
    assert both.lower(x, w).compile().as_text().count(" dot(") == 3


def test_bfloat16_activations_give_a_float32_gradient_of_the_weights():
    x, w, targets = problem()
    for rows in (None, 5):
        y, dx, dw = both_ways(FUSED.bind(rows=rows), x.astype(jnp.bfloat16), w, targets)
        assert (y[0].dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


def test_what_does_not_fit_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    x, w, ids = shape((3, 4, 5), "float32"), shape((5, 7), "float32"), shape((3, 4), "int32")
    cases = [
        ((x, shape((7, 5), "float32"), ids), {}, r"weights w \(D, V\); got \(3, 4, 5\) and \(7"),
        ((x, w, ids), {"tied": True}, r"a table w \(V, D\), as tied=True says; got"),
        ((shape((5,), "float32"), w, ids), {}, r"x of shape \(B, ..., D\)"),
        ((x, w, shape((3,), "int32")), {}, r"labels of shape \(3, 4\); got \(3,\)"),
        ((x, w, ids), {"soft_cap": 0.0}, "soft_cap above 0, or None for no cap; got 0.0"),
        ((x, w, ids), {"z_loss": -1.0}, "z_loss of 0 or more, got -1.0"),
        ((x, w, ids), {"label_smoothing": 2.0}, r"label_smoothing in \[0, 1\], got 2.0"),
        ((x, w, ids), {"rows": 0}, "at least 1 row at a time, got rows=0"),
        ((x, w, ids, shape((4,), "float32")), {}, r"one per position; got \(4,\)"),
    ]
    with nothing_compiles():
        for arrays, options, message in cases:
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(FUSED.bind(**options), *arrays)
        for arrays, message in (
            ((shape((3, 4, 5), "int32"), w, ids), "got int32"),
            ((x, shape((5, 7), "int32"), ids), "floating-point w, got int32"),
            ((x, w, [ids] * 3), "labels as an array of integers, got a list of 3"),
            ((x, w, shape((3, 4), "float32")), "integer labels, got float32"),
        ):
            with pytest.raises(TypeError, match=message):
                jax.eval_shape(FUSED, *arrays)
        for name, wrong in {"rows": 2.5, "soft_cap": "a", "label_smoothing": "a"}.items():
            with pytest.raises(TypeError, match=f"entropy's {name} must be a .*number"):
                jax.eval_shape(FUSED.bind(**{name: wrong}), x, w, ids)
