"""A loss with a balance beside it: two terms, each divided by its own weight."""

import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, normal

BALANCED = bh.losses.with_balance(bh.losses.mean_squared_error, 0.5)


def test_each_term_has_its_own_weight(x64):
    y, balance, targets = normal(0, 3, 4, 2), jnp.array([1.0, 2.0, 4.0]), normal(1, 3, 4, 2)
    weights = jnp.array([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    totals, sums = BALANCED((y, balance), targets, weights)
    own = bh.losses.mean_squared_error(y, targets, weights)
    assert_close((totals["loss"], sums["loss"]), own)
    assert (float(totals["balance"]), float(sums["balance"])) == (0.5 * (4 * 1 + 2 * 2), 6.0)


def test_bad_labels_are_refused_on_the_host(unchecked):
    loss = bh.losses.with_balance(bh.losses.softmax_cross_entropy)
    with pytest.raises(ValueError, match="7"):
        loss.check((jnp.ones((2, 3)), jnp.ones(2)), np.array([1, 7]), None)


def test_what_is_no_such_loss_is_refused(unchecked):
    with pytest.raises(TypeError, match="with_balance needs a loss such as"):
        bh.losses.with_balance(bh.ops.relu)
    with pytest.raises(ValueError, match="a coefficient of 0 or more, got -1"):
        bh.losses.with_balance(bh.losses.huber, -1.0)
    with pytest.raises(ValueError, match=r"needs predictions \(y, balance\), .*, got"):
        BALANCED(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"balance of shape \(B,\), .* got float32 of shape \(\)"):
        BALANCED((jnp.ones((2, 3)), jnp.ones(())), jnp.ones((2, 3)))
