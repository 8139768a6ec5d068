"""A sum carried beside x: begun, added to, passed on, and blamed."""

import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_backward_is_the_gradient, assert_close, initial, normal

EXPERTS = bh.mixture_of_experts(3, 4)


def test_the_sum_begins_grows_and_is_passed_on(x64):
    model = bh.chain(bh.tally(EXPERTS), bh.tally(bh.tanh()), bh.tally(EXPERTS))
    x = normal(0, 2, 5, 4)
    params = initial(model, x)
    y, one = EXPERTS(params[0], x)
    z, other = EXPERTS(params[2], jnp.tanh(y))
    assert_close(model(params, x), (z, one + other))
    assert_backward_is_the_gradient(model, params, x)


def test_it_is_repeated_from_a_sum_that_is_given(x64):
    model = bh.repeat(bh.tally(bh.skip(EXPERTS)), 2)
    x = (normal(0, 2, 5, 4), normal(1, 2))
    assert_backward_is_the_gradient(model, initial(model, x), x)


def test_a_layer_without_anything_beside_is_itself(x64):
    x = normal(0, 2, 3)
    assert_close(bh.tally(bh.tanh())((), x), jnp.tanh(x))
    with pytest.raises(ValueError, match=r"the pair \(x, sum\), got a tuple of 3"):
        bh.tally(bh.tanh())((), (x, x, x))
