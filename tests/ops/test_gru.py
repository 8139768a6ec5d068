"""GRU: which of its two variants it is, and what its gates do."""

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh
from tests.support import normal


def test_the_reset_comes_after_the_product(x64):
    """With wh of the candidate full, r (h wh) is not (r h) wh."""
    wx, b, bn = jnp.zeros((1, 6)), jnp.array([0.3, -2.0, -90.0, -90.0, 0.1, 0.2]), normal(1, 2)
    wh, h = jnp.concatenate([jnp.zeros((2, 4)), normal(2, 2, 2)], 1), normal(3, 1, 2)
    y, _ = bh.ops.gru(jnp.zeros((1, 1, 1)), wx, wh, b, bn, h)
    r = jax.nn.sigmoid(b[:2])[None]
    after = jnp.tanh(b[None, 4:] + r * (h @ wh[:, 4:] + bn[None]))
    before = jnp.tanh(b[None, 4:] + (r * h) @ wh[:, 4:] + bn[None])
    np.testing.assert_allclose(y[:, 0], after, rtol=1e-12)
    assert np.abs(y[:, 0] - before).max() > 0.01


def test_an_open_update_gate_hands_state_and_error_on_whole():
    b = jnp.array([0.0, 100.0, 0.0])
    arrays = (jnp.ones((1, 9, 1)), jnp.ones((1, 3)), jnp.ones((1, 3)), b, jnp.zeros(1))
    state = jnp.full((1, 1), 0.7)
    value, blame = jax.value_and_grad(lambda state: bh.ops.gru(*arrays, state)[1].sum())(state)
    assert abs(float(value) - 0.7) < 1e-6 and abs(float(blame[0, 0]) - 1) < 1e-6
