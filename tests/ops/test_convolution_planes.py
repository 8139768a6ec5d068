"""Planes of any number of places at a time give what XLA's convolution over three axes does."""

import functools

import jax
import pytest

from backhand.ops import convolution_lax, convolution_planes
from backhand.ops.convolution_geometry import Geometry
from tests.support import assert_close, normal, temporary_bytes

WINDOWS = Geometry((2, 1, 2), ((2, 0), (1, 1), (0, 1)), (2, 1, 1), 1)
KERNEL, X, Y = (2, 3, 2), (3, 9, 4, 5, 2), (3, 5, 4, 3, 3)


def by_planes(x, w, y):
    """The three products, those over two axes by XLA."""
    two = convolution_lax
    return (
        convolution_planes.correlate(two.correlate, x, w, WINDOWS),
        convolution_planes.scatter(two.scatter, y, w, WINDOWS, X[1:-1]),
        convolution_planes.weights(two.weights, x, y, WINDOWS, KERNEL),
    )


@pytest.mark.parametrize("limit", [1, 200, 1 << 19], ids=["a place", "3 places", "an example"])
def test_any_blocks_give_the_products_of_xla(limit, x64, monkeypatch):
    monkeypatch.setattr(convolution_planes, "TOGETHER", limit)
    x, w, y = normal(0, *X), normal(1, *KERNEL, 2, 3), normal(2, *Y)
    assert WINDOWS.places(X[1:-1], KERNEL) == Y[1:-1]
    expected = (
        convolution_lax.correlate(x, w, WINDOWS),
        convolution_lax.scatter(y, w, WINDOWS, X[1:-1]),
        convolution_lax.weights(x, y, WINDOWS, KERNEL),
    )
    assert_close(jax.jit(by_planes)(x, w, y), expected)


def test_planes_are_laid_out_a_few_at_a_time():
    """All of the planes that places see, beside each other, are three times the input."""
    windows = Geometry((1, 1, 1), ((1, 1),) * 3, (1, 1, 1), 1)
    x, w = (
        jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 8, 16, 16, 8), (3, 3, 3, 8, 8))
    )
    run = functools.partial(convolution_planes.correlate, convolution_lax.correlate)
    used = temporary_bytes(lambda x, w: run(x, w, windows), x, w)
    assert used < 2.5 * x.size * x.dtype.itemsize


def test_planes_are_counted_where_few_of_their_places_are_seen():
    """With a stride along planes these have many more numbers than there are places."""
    windows, kernel = Geometry((1, 4, 4), ((1, 1), (0, 0), (0, 0)), (1, 1, 1), 1), (3, 4, 4)
    x, y = (
        jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 8, 32, 32, 8), (4, 8, 8, 8, 8))
    )
    run = functools.partial(convolution_planes.weights, convolution_lax.weights)
    used = temporary_bytes(lambda x, y: run(x, y, windows, kernel), x, y)
    assert used < 1.5 * x.size * x.dtype.itemsize
