"""The simple recurrent network: how errors fade, its kink, its activations."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_close, normal


@pytest.mark.parametrize(("weight", "blame"), [(0.5, 0.5**10), (2.0, 2.0**10)])
def test_an_error_vanishes_or_explodes_with_the_recurrent_weight(weight, blame):
    one, zero, w = jnp.ones((1, 1)), jnp.zeros(1), jnp.full((1, 1), weight)
    arrays = (jnp.zeros((1, 10, 1)), one, w, zero)
    last = jax.grad(lambda h: bh.ops.elman(*arrays, h, activation="relu")[1].sum())(one)
    assert float(last[0, 0]) == blame


def test_at_the_kink_there_is_no_blame():
    """As `jax.nn.relu` at 0, where everything begins."""
    arrays = (jnp.zeros((2, 3, 2)), normal(0, 2, 4), normal(1, 4, 4), jnp.zeros(4))
    blame = jax.grad(lambda *a: bh.ops.elman(*a, activation="relu")[0].sum(), (0, 1, 2, 3))(*arrays)
    assert not any(leaf.any() for leaf in blame)


def test_relu_agrees_with_the_reference(x64):
    arrays = (normal(5, 20, 6, 2), normal(0, 2, 4), normal(1, 4, 4), normal(2, 4))
    op = bh.ops.elman.bind(activation="relu")
    ours, truth = (
        jax.vjp(f, *arrays)[1]((normal(6, 20, 6, 4), normal(7, 20, 4))) for f in (op, op.reference)
    )
    assert_close(ours, truth)


def test_another_activation_is_refused():
    arrays = (jnp.zeros((2, 3, 2)), jnp.zeros((2, 4)), jnp.zeros((4, 4)), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"elman needs activation .tanh. or .relu., got 'gelu'"):
        bh.ops.elman(*arrays, activation="gelu")
