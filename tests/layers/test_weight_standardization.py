"""A layer around another whose weight it standardizes."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_backward_is_the_gradient, assert_close, initial, normal


def test_the_weight_used_is_standardized_and_the_one_learned_is_not(x64):
    layer, x = bh.standardized(bh.dense(3)), normal(0, 5, 4)
    params = initial(layer, x)
    assert params.keys() == {"w", "b"}
    expected = x @ bh.ops.weight_standardization.reference(params["w"]) + params["b"][None]
    assert_close(layer(params, x), expected)
    assert_close(layer({**params, "w": 2 + 3 * params["w"]}, x), expected, 1e-3)
    assert_backward_is_the_gradient(layer, params, x)


def test_a_convolution_takes_one_too(x64):
    layer, x = bh.standardized(bh.conv(3, (2, 2)), eps=0.1), normal(0, 2, 4, 4, 2)
    assert_backward_is_the_gradient(layer, initial(layer, x), x)


def test_a_layer_without_a_weight_or_with_side_inputs_is_refused():
    with pytest.raises(ValueError, match="without side inputs, got dropout, which uses key, train"):
        bh.standardized(bh.dropout(0.5))
    with pytest.raises(ValueError, match="a layer with one weight 'w', as dense has; got relu"):
        bh.standardized(bh.relu()).init(jax.random.key(0), jnp.ones((2, 3)))
