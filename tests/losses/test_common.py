"""Weights: what is left out, what is divided, and on the host what is refused."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

import backhand as bh
from backhand.losses.common import check_weights, masked, weighted_sum
from tests.support import assert_close, labels, normal

LOSSES = {
    "mean_squared_error": lambda: (normal(0, 3, 4), normal(1, 3, 4)),
    "mean_absolute_error": lambda: (normal(0, 3, 4), normal(1, 3, 4)),
    "huber": lambda: (2 * normal(0, 3, 4), normal(1, 3, 4)),
    "sigmoid_cross_entropy": lambda: (normal(0, 3, 4), labels(1, 2, 3, 4)),
    "softmax_cross_entropy": lambda: (normal(0, 3, 4, 5), labels(1, 5, 3, 4)),
}


def both_ways(loss, predictions, targets, weights):
    """(sum, weight) and the error of the predictions."""
    y, residuals = loss.forward(predictions, targets, weights)
    return y, loss.backward(residuals, (jnp.ones_like(y[0]), jnp.zeros_like(y[1])))[0]


@pytest.mark.parametrize("name", LOSSES)
@given(arrays.arrays(np.float32, (3, 4), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])))
@settings(max_examples=5)
def test_a_weighted_sum_is_the_sum_of_weighted_positions(name, weights):
    with jax.enable_x64(True):
        loss, (predictions, targets) = getattr(bh.losses, name), LOSSES[name]()
        one = [
            float(loss(predictions[i : i + 1, j : j + 1], targets[i : i + 1, j : j + 1])[0])
            for i, j in np.ndindex(3, 4)
        ]
        total, weight = loss(predictions, targets, jnp.asarray(weights))
        assert float(total) == pytest.approx(float(np.dot(one, weights.ravel())), rel=1e-12)
        assert float(weight) == pytest.approx(float(weights.sum()))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_may_be_of_examples_or_positions_booleans_or_numbers(x64, name):
    loss, (predictions, targets) = getattr(bh.losses, name), LOSSES[name]()
    keep = jnp.asarray([True, False, True])
    spread = jnp.broadcast_to(keep[:, None], (3, 4))
    expected = both_ways(loss, predictions, targets, spread.astype(float))
    for weights in (keep, keep.astype(jnp.int32), spread, spread.astype(jnp.bfloat16)):
        assert_close(both_ways(loss, predictions, targets, weights), expected)
    ones = both_ways(loss, predictions, targets, jnp.ones(3))
    assert_close(both_ways(loss, predictions, targets, None), ones)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sick", [np.nan, np.inf, -np.inf])
def test_a_position_of_weight_zero_is_left_out_whatever_is_in_it(x64, name, sick):
    loss, (predictions, targets) = getattr(bh.losses, name), LOSSES[name]()
    weights = jnp.ones((3, 4)).at[1, 2].set(0)
    clean = both_ways(loss, predictions, targets, weights)
    found = both_ways(loss, predictions.at[1, 2].set(sick), targets, weights)
    assert_close(found, clean)
    assert not found[1][1, 2].any()
    seen = both_ways(loss, predictions.at[1, 2].set(sick), targets, None)
    assert not np.isfinite(seen[0][0]) or not np.isfinite(seen[1]).all()


def test_losses_and_weights_are_differentiated_in_the_weights_too(x64):
    predictions, targets = normal(0, 3, 4), normal(1, 3, 4)
    weights = jnp.asarray([0.0, 1.0, 2.0])

    def mean(weights, loss):
        total, weight = loss(predictions, targets, weights)
        return total / weight

    loss = bh.losses.huber
    assert_close(jax.grad(mean)(weights, loss), jax.grad(mean)(weights, loss.reference))


def test_nothing_times_zero_is_zero():
    w, x = jnp.asarray([0.0, 0.0, 2.0, 2.0]), jnp.asarray([jnp.nan, 3.0, 3.0, jnp.inf])
    assert masked(w, x).tolist() == [0, 0, 6, np.inf]
    assert jax.grad(lambda w: masked(w, x).sum())(w).tolist()[1:3] == [3, 3]
    total, weight = weighted_sum("loss", jnp.ones((2, 3)), None)
    assert (float(total), float(weight)) == (6, 6)


def test_wrong_weights_are_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    losses = shape((3, 4), "float32")
    with nothing_compiles():
        for wrong in ((4,), (3, 5), (3, 4, 1)):
            with pytest.raises(
                ValueError, match=r"loss needs weights whose shape begins as .* got"
            ):
                jax.eval_shape(lambda *a: weighted_sum("loss", *a), losses, shape(wrong, "float32"))
        for given in (([1.0] * 3,), (losses, [1.0] * 3)):
            with pytest.raises(TypeError, match="as an array, got a list of 3; jnp"):
                jax.eval_shape(bh.losses.mean_squared_error, losses, *given)
        with pytest.raises(
            ValueError, match=r"0 or more, got -2.0 at \[1, 0\]; a mask is a weight"
        ):
            check_weights(None, None, np.asarray([[1.0, 0], [-2, -1]]))
        with pytest.raises(ValueError, match=r"0 or more, got nan at \[1\]"):
            check_weights(None, None, np.asarray([1.0, np.nan, 0.0]))
    check_weights(None, None, np.zeros(3, bool))
    check_weights(None, None, None)


def test_a_negative_weight_on_the_device_makes_the_loss_and_its_gradient_nan():
    squared = bh.losses.mean_squared_error
    weights = jnp.asarray([1.0, -1.0, 0.0])

    def loss(p):
        total, weight = squared(p, jnp.zeros((3, 2)), weights)
        return total / weight

    value, gradient = jax.value_and_grad(loss)(jnp.ones((3, 2)))
    assert jnp.isnan(value) and jnp.isnan(gradient).all()
