"""Means over groups are those of the elements, each feature times its scale."""

import jax.numpy as jnp
import pytest

from backhand.ops.averages import over_batch, over_features, over_groups
from tests.support import assert_close, normal

X = (5, 2, 3, 6)
HOW = {
    "features": (over_features, lambda x: x.mean(-1, keepdims=True)),
    "batch": (over_batch, lambda x: x.mean((0, 1, 2), keepdims=True)),
    "groups": (
        lambda x: over_groups(x, 2),
        lambda x: jnp.repeat(x.reshape(5, 6, 2, 3).mean((1, 3)), 3, -1)[:, None, None],
    ),
}


@pytest.mark.parametrize("name", HOW)
def test_means_are_those_of_the_elements(x64, name):
    average_of, expected = HOW[name]
    x, scale = normal(0, *X), normal(1, X[-1])
    average = average_of(x)
    assert_close(average(x), expected(x))
    sums = average.sums(x)
    assert_close(average.mean(sums, scale), expected(x * scale.reshape(1, 1, 1, -1)))
    assert_close(sums.sum((1, 2)), x.sum((1, 2)))


def test_the_mean_of_nothing_is_zero_and_what_is_no_number_stays_so():
    empty = jnp.zeros((0, 3))
    assert over_batch(empty)(empty).tolist() == [[0, 0, 0]]
    x = jnp.asarray([[jnp.inf, 1.0], [jnp.nan, 2.0], [3.0, 4.0]])
    found = over_features(x)(x)[:, 0]
    assert jnp.isinf(found[0]) and jnp.isnan(found[1]) and found[2] == 3.5
