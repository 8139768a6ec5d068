"""Learned and sinusoidal positions as layers."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    initial,
    normal,
)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_table_longer_than_the_text_has_the_gradient_of_autodiff(tokens, x64):
    layer, x = bh.positional_embedding(4), normal(0, 2, tokens, 3)
    params = initial(layer, x)
    assert_close(layer(params, x), x + params["table"][None, :tokens])
    assert_backward_is_the_gradient(layer, params, x)


def test_positions_that_nobody_read_get_no_blame(x64):
    layer, x = bh.positional_embedding(5), normal(0, 2, 3, 4)
    grads, dx = layer.backward(initial(layer, x), (), x)
    assert_close(grads["table"][:3], x.sum(0))
    assert not grads["table"][3:].any()
    assert dx is x


def test_norms_per_example_come_from_the_same_pass(x64):
    model = bh.chain(bh.positional_embedding(6), bh.flatten(), bh.dense(2))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 4, 5, 3), "targets": normal(1, 4, 2)}
    params = objective.init(jax.random.key(0), batch)
    assert_gradient_and_norms(objective, params, batch)


def test_sinusoids_are_a_layer_without_parameters():
    layer, x = bh.sinusoidal(base=100.0), normal(0, 2, 3, 4)
    assert layer.init(jax.random.key(0), x) == ()
    assert_close(layer((), x), bh.ops.sinusoidal(x, base=100.0))


def test_what_has_no_place_in_the_table_is_refused(unchecked):
    with pytest.raises(ValueError, match="a length of at least 1, got 0"):
        bh.positional_embedding(0)
    layer = bh.positional_embedding(4)
    params = {"table": jnp.ones((4, 3))}
    for shape in ((2, 5, 3), (2, 3)):
        with pytest.raises(ValueError, match="with at most 4 tokens, got"):
            layer(params, jnp.ones(shape))
    with pytest.raises(TypeError, match="floating-point input, got int32"):
        layer.init(jax.random.key(0), jnp.ones((2, 3, 3), jnp.int32))
