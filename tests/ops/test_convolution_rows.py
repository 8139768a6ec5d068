"""Shifts of rows after the product are the convolution, whatever the padding and the blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from backhand.ops import convolution_columns, convolution_lax, convolution_rows
from backhand.ops.convolution_geometry import Geometry
from tests.support import assert_close, normal, temporary_bytes

WINDOWS = [
    (Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1), (3, 3)),
    (Geometry((1, 1), ((0, 4), (3, 0)), (2, 1), 1), (2, 4)),
    (Geometry((1, 1), ((5, 0), (0, 0)), (1, 3), 1), (3, 1)),
]


@pytest.mark.parametrize("limit", [1, 400, 1 << 20])
@pytest.mark.parametrize(("windows", "kernel"), WINDOWS)
def test_any_blocks_give_what_the_compilers_convolution_gives(
    windows, kernel, limit, x64, monkeypatch
):
    monkeypatch.setattr(convolution_rows, "TOGETHER", limit)
    monkeypatch.setattr(convolution_columns, "COLUMNS", limit)
    x, w = normal(0, 5, 6, 7, 3), normal(1, *kernel, 3, 2)
    y = normal(2, 5, *windows.places((6, 7), kernel), 2)

    def three(module):
        return (
            module.correlate(x, w, windows),
            module.scatter(y, w, windows, (6, 7)),
            module.weights(x, y, windows, kernel),
        )

    @jax.jit
    def run():
        both = convolution_rows.scatter_and_weights(x, y, w, windows)
        return both, three(convolution_rows), three(convolution_lax)

    both, found, expected = run()
    assert_close(found, expected)
    assert_close(both, expected[1:])


@pytest.mark.parametrize("limit", [200, 1 << 20])
@pytest.mark.parametrize(("windows", "kernel"), WINDOWS)
def test_groups_are_summed_in_parts(windows, kernel, limit, monkeypatch):
    """Of 65 places there is one left over."""
    monkeypatch.setattr(convolution_rows, "PART", 4)
    monkeypatch.setattr(convolution_columns, "COLUMNS", limit)
    windows = dataclasses.replace(windows, groups=3)
    x, y = normal(0, 5, 13, 1, 6), normal(1, 5, *windows.places((13, 1), kernel), 9)
    found = jax.jit(lambda: convolution_rows.weights(x, y, windows, kernel))()
    assert_close(found, convolution_lax.weights(x, y, windows, kernel), 1e-6)


def test_memory_does_not_grow_with_the_batch():
    windows = WINDOWS[0][0]

    def bytes_of(batch):
        arrays = [jax.ShapeDtypeStruct(s, "float32") for s in ((batch, 32, 32, 32), (3, 3, 32, 32))]
        return temporary_bytes(lambda x, w: convolution_rows.correlate(x, w, windows), *arrays)

    assert bytes_of(128) <= 1.01 * bytes_of(64) < 8e6


def test_low_precision_is_summed_in_float32():
    """After 256, bfloat16 cannot count further by ones."""
    windows, kernel = WINDOWS[1]
    x = jnp.ones((2, 30, 20, 2), jnp.bfloat16)
    y = jnp.ones((2, *windows.places((30, 20), kernel), 3), jnp.bfloat16)
    dw = convolution_rows.weights(x, y, windows, kernel)
    expected = convolution_lax.weights(*(a.astype("float32") for a in (x, y)), windows, kernel)
    assert dw.dtype == jnp.float32 and jnp.array_equal(dw, expected)
    _, both = convolution_rows.scatter_and_weights(x, y, dw.astype(jnp.bfloat16), windows)
    assert jnp.array_equal(both, expected)
