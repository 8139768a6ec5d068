"""A sum by blocks is the sum at once, whatever their size, and holds a block's columns only."""

import jax
import pytest

from backhand.ops import convolution_columns, convolution_lax
from backhand.ops.convolution_geometry import Geometry
from tests.support import assert_close, normal, temporary_bytes

GAPS = Geometry((2, 1), ((1, 0), (0, 2)), (1, 2), 1)
STRIDES = Geometry((2, 1), ((1, 0), (0, 1)), (1, 1), 1)
PATCHES = Geometry((4, 2), ((0, 0), (0, 0)), (1, 1), 1)
KERNEL, X = (4, 2), (5, 11, 4, 4)


@pytest.mark.parametrize("limit", [1, 300, 600, 1500, 1 << 17])
@pytest.mark.parametrize("windows", [GAPS, STRIDES, PATCHES])
def test_any_blocks_give_the_same_sum(windows, limit, x64, monkeypatch):
    """From one row of one example at a time to the whole batch."""
    monkeypatch.setattr(convolution_columns, "BLOCK", limit)
    monkeypatch.setattr(convolution_columns, "BLOCKS", 1)
    x, y = normal(0, *X), normal(1, X[0], *windows.places(X[1:-1], KERNEL), 6)
    found, expected = (
        jax.jit(lambda x, y, f=f: f(x, y, windows, KERNEL))(x, y)
        for f in (convolution_columns.weights_by_columns, convolution_lax.weights)
    )
    assert_close(found, expected)


def test_memory_does_not_grow_with_the_batch():
    windows = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1)

    def bytes_of(batch):
        arrays = (jax.ShapeDtypeStruct((batch, 32, 32, 16), "float32"),) * 2
        return temporary_bytes(
            lambda x, y: convolution_columns.weights_by_columns(x, y, windows, (3, 3)), *arrays
        )

    assert bytes_of(2048) <= 1.01 * bytes_of(512) < 2e6
