"""One group after another gives what all at once do."""

import jax
import jax.numpy as jnp

from backhand.ops.convolution_groups import by_groups
from tests.support import assert_close, normal


def test_groups_stand_side_by_side(x64):
    x, y = normal(0, 5, 6), normal(1, 5, 3)
    found = jax.jit(lambda x, y: by_groups(lambda x, y: x.T @ y, 3, x, y))(x, y)
    parts = [x[:, 2 * i : 2 * i + 2].T @ y[:, i : i + 1] for i in range(3)]
    assert_close(found, jnp.concatenate(parts, -1))


def test_one_group_is_all_of_them():
    """Nothing is cut or put together for it."""
    x, y = normal(0, 5, 6), normal(1, 5, 3)
    run = jax.make_jaxpr(lambda x, y: by_groups(lambda x, y: x.T @ y, 1, x, y))(x, y)
    assert "dynamic" not in str(run) and "while" not in str(run)
