"""Convolution over three axes by that over two: planes along the first, a few at a time.

A place p of the first axis sees K planes. With their channels beside each other they are one plane
of K I channels, b[p] = x[s p + d k - lo] for k = 0 .. K - 1, and so are the weights, w'. With a
star for convolution over the other two axes:

    correlate    y[p] = b[p] * w'
    scatter      what y[p] gives back to b[p], each share added to its own plane of x
    weights      w' is what all b[p] and y[p] joined

XLA's own on CPU, both ways by 3x3x3, took 3 times as long with 8x8x16x16x16 to 32, 5 times with
1x16x28x28x64 to 64.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, upcast, varying
from backhand.ops.convolution_blocks import each_block
from backhand.ops.convolution_geometry import Geometry

X = Float[Array, "B D R S I"]
Y = Float[Array, "B N P Q O"]
W = Float[Array, "K L M I O"]
Index = Array | int

TOGETHER = 1 << 19
"""Elements that planes with K I channels have at a time: 2 MB in float32. At most a quarter of what
the larger of input and output has, so that they are not what memory is needed for."""


def correlate(planes: Callable[..., Array], x: X, w: W, windows: Geometry) -> Y:
    """`planes` is the product over two axes, of their x, w and windows."""
    kernel, matrix = w.shape[:3], _as_channels(w)
    places = windows.places(x.shape[1:-1], kernel)
    padded = _padded(x, windows)

    def add(y: Y, first: Index, count: int, start: Index, length: int) -> Y:
        seen = _beside(padded, windows, kernel[0], first, count, start, length)
        own = planes(seen, matrix, windows.of_planes).reshape(count, length, *y.shape[2:])
        return _put(y, own, first, start)

    y = varying(jnp.zeros((x.shape[0], *places, w.shape[-1]), x.dtype), x, w)
    return _over_places(add, y, x, y, kernel[0])


def scatter(
    planes: Callable[..., Array], y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]
) -> X:
    """`planes` is the product over two axes, of their y, w, windows and sizes."""
    (depth, *flat), inputs, taps = sizes, w.shape[-2], w.shape[0]
    (stride, dilation), (front, behind) = _steps(windows), windows.padding[0]
    matrix = _as_channels(upcast(w))

    def add(x: X, first: Index, count: int, start: Index, length: int) -> X:
        error = upcast(_slice(y, first, count, start, length))
        error = error.reshape(-1, *error.shape[2:])
        given = planes(error, matrix, windows.of_planes, tuple(flat))
        given = given.reshape(count, length, *flat, taps, inputs)
        span = _span(windows, taps, length)

        def share(k: int) -> Array:
            """What the planes get that are the k-th of some place."""
            pads = [(0, 0, 0)] * 5
            own = (length - 1) * stride + 1
            pads[1] = (dilation * k, span - dilation * k - own, stride - 1)
            return lax.pad(given[..., k, :], jnp.zeros((), given.dtype), pads)

        shares = functools.reduce(operator.add, map(share, range(taps)))
        so_far = _slice(x, first, count, stride * start, span)
        return _put(x, so_far + shares, first, stride * start)

    zeros = jnp.zeros((y.shape[0], front + depth + behind, *flat, inputs), upcast(y).dtype)
    x = _over_places(add, varying(zeros, y, w), zeros, y, taps)
    return lax.slice_in_dim(x, front, front + depth, axis=1).astype(y.dtype)


def weights(
    planes: Callable[..., Array], x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]
) -> W:
    """`planes` is the product over two axes, of their x, y, windows and kernel."""
    (taps, *flat), inputs, outputs = kernel, x.shape[-1], y.shape[-1]
    padded = _padded(x, windows)

    def add(dw: Array, first: Index, count: int, start: Index, length: int) -> Array:
        seen = _beside(padded, windows, taps, first, count, start, length)
        error = _slice(y, first, count, start, length).reshape(-1, *y.shape[2:])
        return dw + planes(seen, error, windows.of_planes, tuple(flat))

    wide = accumulation_dtype(x.dtype, y.dtype)
    zeros = varying(jnp.zeros((*flat, taps * inputs, outputs), wide), x, y)
    dw = _over_places(add, zeros, x, y, taps)
    return jnp.moveaxis(dw.reshape(*flat, taps, inputs, outputs), 2, 0)


def _over_places(add: Callable[..., Array], start: Array, x: X, y: Y, taps: int) -> Array:
    """`add(so far, first example, how many, first place, how many)` over blocks of all places."""
    examples, places = y.shape[:2]
    most = min(TOGETHER, max(x.size, y.size) // 4)
    most = max(1, most // (taps * math.prod(x.shape[2:])))

    def of_example(so_far: Array, first: Index, _: int) -> Array:
        return each_block(
            lambda so_far, start, length: add(so_far, first, 1, start, length), so_far, places, most
        )

    def of_examples(so_far: Array, first: Index, count: int) -> Array:
        return add(so_far, first, count, 0, places)

    if most < places:
        return each_block(of_example, start, examples, 1)
    return each_block(of_examples, start, examples, most // places)


def _beside(
    x: X, windows: Geometry, taps: int, first: Index, count: int, start: Index, length: int
) -> Float[Array, "N R S C"]:
    """The planes that some places see, K beside each other."""
    stride, dilation = _steps(windows)
    own = _slice(x, first, count, stride * start, _span(windows, taps, length))
    last = (length - 1) * stride + 1
    seen = [
        lax.slice_in_dim(own, dilation * k, dilation * k + last, stride, 1) for k in range(taps)
    ]
    joined = jnp.concatenate(seen, -1)
    return joined.reshape(-1, *joined.shape[2:])


def _as_channels(w: W) -> Float[Array, "L M C O"]:
    moved = jnp.moveaxis(w, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, moved.shape[-1])


def _padded(x: X, windows: Geometry) -> Float[Array, "B Z R S I"]:
    return jnp.pad(x, [(0, 0), windows.padding[0], *[(0, 0)] * 3])


def _steps(windows: Geometry) -> tuple[int, int]:
    return windows.stride[0], windows.dilation[0]


def _span(windows: Geometry, taps: int, length: int) -> int:
    """How many planes there are from the first to the last that so many places see."""
    stride, dilation = _steps(windows)
    return (length - 1) * stride + dilation * (taps - 1) + 1


def _slice(x: Array, first: Index, count: int, start: Index, length: int) -> Array:
    return lax.dynamic_slice(x, _at(x, first, start), (count, length, *x.shape[2:]))


def _put(x: Array, part: Array, first: Index, start: Index) -> Array:
    return lax.dynamic_update_slice(x, part, _at(x, first, start))


def _at(x: Array, first: Index, start: Index) -> list[Any]:
    return [jnp.asarray(index, jnp.int32) for index in (first, start, *[0] * (x.ndim - 2))]
