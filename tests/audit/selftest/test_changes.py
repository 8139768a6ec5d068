"""What bugs make of one leaf: something else, of the same dtype, or the leaf itself."""

import numpy as np
import pytest

from backhand.audit.selftest import changes
from backhand.audit.selftest.plants import Site

SITE = Site((0, 0), batch=6)
LEAF = np.random.default_rng(0).standard_normal((6, 6))
ALIKE = ("missing_mean", "extra_mean", "transposed", "back_to_front", "rolled", "permuted")
ALIKE += ("wrong_axis", "without_mean", "with_mean", "offset", "ragged", "border", "stride")


@pytest.mark.parametrize("name", ALIKE)
def test_a_change_keeps_shape_and_dtype(name):
    found = getattr(changes, name)(LEAF, SITE)
    assert (found.shape, found.dtype) == (LEAF.shape, LEAF.dtype)
    assert not np.array_equal(found, LEAF)


def test_a_change_leaves_what_it_cannot_change():
    alone = np.ones(())
    for name in ("transposed", "rolled", "permuted", "ragged", "border", "stride", "last_of_odd"):
        assert getattr(changes, name)(alone, SITE) is alone


def test_an_order_is_no_shift_and_no_reversal():
    found = changes.permuted(LEAF, SITE)
    assert sorted(map(tuple, found)) == sorted(map(tuple, LEAF))
    others = [np.roll(LEAF, n, 0) for n in range(6)] + [LEAF[::-1]]
    assert not any(np.array_equal(found, other) for other in others)
