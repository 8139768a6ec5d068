"""A loss with a recurrent state beside it: the loss of the predictions, the state without blame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, normal

STATEFUL = bh.losses.with_state(bh.losses.mean_squared_error)


def test_it_is_the_loss_of_the_predictions_alone(x64):
    y, targets, state = normal(0, 3, 4), normal(1, 3, 4), (normal(2, 3, 2), normal(3, 3, 2))
    assert_close(STATEFUL((y, state), targets), bh.losses.mean_squared_error(y, targets))
    blame = jax.grad(lambda *predictions: STATEFUL(predictions, targets)[0], (0, 1))(y, state)
    assert_close(blame, (2 * (y - targets), jax.tree.map(jnp.zeros_like, state)))


def test_a_loss_without_targets_stays_one():
    assert STATEFUL.has_targets and not bh.losses.with_state(bh.losses.triplet).has_targets


def test_bad_labels_are_refused_on_the_host(unchecked):
    loss = bh.losses.with_state(bh.losses.softmax_cross_entropy)
    with pytest.raises(ValueError, match="7"):
        loss.check((jnp.ones((2, 3)), jnp.ones(2)), np.array([1, 7]), None)


def test_what_has_no_state_is_refused(unchecked):
    with pytest.raises(TypeError, match="with_state needs a loss such as"):
        bh.losses.with_state(bh.ops.relu)
    with pytest.raises(ValueError, match=r"needs predictions \(y, state\), .*, got"):
        STATEFUL(jnp.ones((2, 3)), jnp.ones((2, 3)))
