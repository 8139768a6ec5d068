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

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, upcast, varying
from backhand.ops.convolution_blocks import by_examples, each_block
from backhand.ops.convolution_columns import in_blocks, places_at_once
from backhand.ops.convolution_geometry import Geometry

X = Float[Array, "B D R S I"]
Y = Float[Array, "B N P Q O"]
W = Float[Array, "K L M I O"]

TOGETHER = 1 << 19
"""Elements that planes with K I channels have at a time: 2 MB in float32. At most a quarter of what
the larger of input and output has, so that they are not what memory is needed for."""


def correlate(planes: Callable[..., Array], x: X, w: W, windows: Geometry) -> Y:
    """`planes` is the product over two axes, of their x, w and windows."""
    kernel, matrix = w.shape[:3], _as_channels(w)
    places = windows.places(x.shape[1:-1], kernel)
    at_once = _places(x.shape, x.size // x.shape[-1] * w.shape[-1], kernel[0])

    def run(x: X) -> Y:
        padded = jnp.pad(x, ((0, 0), windows.padding[0], *[(0, 0)] * 3))

        def add(y: Y, start: Array | int, length: int) -> Y:
            seen = _beside(padded, windows, kernel[0], start, length)
            found = planes(_flat(seen), matrix, windows.of_planes)
            own = found.reshape(x.shape[0], length, *y.shape[2:])
            return lax.dynamic_update_slice_in_dim(y, own, start, 1)

        y = varying(jnp.zeros((x.shape[0], *places, w.shape[-1]), x.dtype), x, w)
        return each_block(add, y, places[0], at_once)

    return by_examples(run, x, at_once // places[0])


def scatter(
    planes: Callable[..., Array], y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]
) -> X:
    """`planes` is the product over two axes, of their y, w, windows and sizes."""
    (depth, *flat), inputs, taps = sizes, w.shape[-2], w.shape[0]
    front, behind = windows.padding[0]
    matrix = _as_channels(upcast(w))
    at_once = _places((*y.shape[:1], *sizes, inputs), y.size, taps)

    def run(y: Y) -> X:
        def add(x: X, start: Array | int, length: int) -> X:
            error = _flat(upcast(lax.dynamic_slice_in_dim(y, start, length, 1)))
            given = planes(error, matrix, windows.of_planes, tuple(flat))
            given = given.reshape(y.shape[0], length, *flat, taps, inputs)
            first = start * windows.stride[0]
            shares = _added_up(given, windows)
            so_far = lax.dynamic_slice_in_dim(x, first, shares.shape[1], 1)
            return lax.dynamic_update_slice_in_dim(x, so_far + shares, first, 1)

        zeros = jnp.zeros((y.shape[0], front + depth + behind, *flat, inputs), upcast(y).dtype)
        x = each_block(add, varying(zeros, y, w), y.shape[1], at_once)
        return lax.slice_in_dim(x, front, front + depth, axis=1).astype(y.dtype)

    return by_examples(run, y, at_once // y.shape[1])


def weights(
    planes: Callable[..., Array], x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]
) -> W:
    """`planes` is the product over two axes, of their x, y, windows and kernel."""
    (taps, *flat), inputs, outputs = kernel, x.shape[-1], y.shape[-1]
    inside = Geometry(windows.stride[1:], ((0, 0),) * 2, windows.dilation[1:], 1)

    def product(x: X, y: Y) -> Array:
        seen = _beside(x, windows, taps, 0, y.shape[1])
        return planes(_flat(seen), _flat(y), inside, tuple(flat))

    wide = accumulation_dtype(x.dtype, y.dtype)
    zeros = jnp.zeros((*flat, taps * inputs, outputs), wide)
    seen = -(-math.prod(x.shape[2:-1]) // max(1, math.prod(y.shape[2:-1])))  # for a place of y
    most = places_at_once(x, y, 2 * taps * inputs * seen)
    dw = in_blocks(product, x, y, windows, kernel, zeros, most)
    return jnp.moveaxis(dw.reshape(*flat, taps, inputs, outputs), 2, 0)


def _places(shape: tuple[int, ...], other: int, taps: int) -> int:
    """Of how many places planes of an array of this shape are laid out at a time."""
    most = min(TOGETHER, max(math.prod(shape), other) // 4)
    return max(1, most // (taps * math.prod(shape[2:])))


def _beside(
    x: X, windows: Geometry, taps: int, start: Array | int, length: int
) -> Float[Array, "B N R S C"]:
    """The planes that some places see, K beside each other; x is padded already."""
    stride, dilation = windows.stride[0], windows.dilation[0]
    span = (length - 1) * stride + dilation * (taps - 1) + 1
    own = lax.dynamic_slice_in_dim(x, start * stride, span, 1)
    last = (length - 1) * stride + 1
    firsts = (dilation * k for k in range(taps))
    return jnp.concatenate([lax.slice_in_dim(own, k, k + last, stride, 1) for k in firsts], -1)


def _added_up(given: Float[Array, "B N R S K I"], windows: Geometry) -> X:
    """What the planes get that some places saw: the way back of `_beside`."""
    stride, dilation = windows.stride[0], windows.dilation[0]
    behind = dilation * (given.shape[-2] - 1)

    def share(k: int) -> Array:
        pads = [(0, 0, 0), (dilation * k, behind - dilation * k, stride - 1), *[(0, 0, 0)] * 3]
        return lax.pad(given[..., k, :], jnp.zeros((), given.dtype), pads)

    return functools.reduce(operator.add, map(share, range(given.shape[-2])))


def _as_channels(w: W) -> Float[Array, "L M C O"]:
    moved = jnp.moveaxis(w, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, moved.shape[-1])


def _flat(x: Float[Array, "B N R S C"]) -> Float[Array, "_ R S C"]:
    return x.reshape(-1, *x.shape[2:])
