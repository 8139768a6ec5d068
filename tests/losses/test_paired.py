"""A loss of two predictions: what it is a loss of, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_close, normal

PAIRED = bh.losses.paired(bh.losses.mean_squared_error)


def test_both_predictions_are_blamed_apart_or_in_one_array(x64):
    x, y = normal(0, 3, 4), normal(1, 3, 4)
    blame = jax.grad(lambda *both: PAIRED(both)[0], (0, 1))(x, y)
    assert_close(blame, (2 * (x - y), 2 * (y - x)))
    blame = jax.grad(lambda both: PAIRED(both)[0])(jnp.stack((x, y), 1))
    assert_close(blame, jnp.stack((2 * (x - y), 2 * (y - x)), 1))


def test_what_is_not_a_pair_is_refused(unchecked):
    x, ids = jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32)
    for loss in (bh.ops.relu, bh.losses.triplet):
        with pytest.raises(TypeError, match="paired needs a loss with targets, such as"):
            bh.losses.paired(loss)
    for wrong, got in (((x, x, x), "a tuple of 3"), (x, r"shape \(2, 3\)"), ({"x": x}, "dict")):
        with pytest.raises(ValueError, match=rf"needs predictions \(x, y\), .*; got {got}"):
            PAIRED(wrong)
    with pytest.raises(TypeError, match="paired has no targets"):
        PAIRED((x, x), x)
    of_ids = bh.losses.paired(bh.losses.softmax_cross_entropy)
    with pytest.raises(TypeError, match="an error for its targets, unlike softmax_cross_entropy"):
        jax.grad(lambda x: of_ids((x, ids[:, 0]))[0])(x)
