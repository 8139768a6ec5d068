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
from backhand.ops.convolution_blocks import each_block
from backhand.ops.convolution_columns import in_blocks
from backhand.ops.convolution_geometry import Geometry

X = Float[Array, "B D R S I"]
Y = Float[Array, "B N P Q O"]
W = Float[Array, "K L M I O"]

TOGETHER = 1 << 16
"""Elements that planes with K I channels have at a time: 0.25 MB in float32. At most a quarter of
what the larger of input and output has, so that they are not what memory is needed for."""

PLACES = 512
"""Of how many places a weight's gradient is summed at a time: 8x8x16x16x16 by 3x3x3 to 32 took the
time of 1280 places so, with 0.8 of the rounding."""


def correlate(planes: Callable[..., Array], x: X, w: W, windows: Geometry) -> Y:
    """`planes` is the product over two axes, of their x, w and windows."""
    kernel, matrix = w.shape[:3], _as_channels(w)
    places = windows.places(x.shape[1:-1], kernel)
    at_once = _places(x.shape, x.size // x.shape[-1] * w.shape[-1], kernel[0])

    def add(y: Y, first: Array | int, count: int, start: Array | int, length: int) -> Y:
        span = (length - 1) * windows.stride[0] + windows.reach(kernel)[0]
        at = x.at[_seen(windows, first, count, start, span)]
        own = at.get(mode="fill", fill_value=0, wrap_negative_indices=False)
        seen = _beside(own, windows, kernel[0], length)
        found = planes(_flat(seen), matrix, windows.of_planes)
        here = [jnp.asarray(n, jnp.int32) for n in (first, start, 0, 0, 0)]
        return lax.dynamic_update_slice(y, found.reshape(count, length, *y.shape[2:]), here)

    y = jnp.zeros((x.shape[0], *places, w.shape[-1]), x.dtype)
    return _each_block(add, varying(y, x, w), (x.shape[0], places[0]), at_once)


def scatter(
    planes: Callable[..., Array], y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]
) -> X:
    """`planes` is the product over two axes, of their y, w, windows and sizes."""
    flat, inputs, taps = sizes[1:], w.shape[-2], w.shape[0]
    matrix = _as_channels(upcast(w))
    at_once = _places((*y.shape[:1], *sizes, inputs), y.size, taps)

    def add(x: X, first: Array | int, count: int, start: Array | int, length: int) -> X:
        here = [jnp.asarray(n, jnp.int32) for n in (first, start, 0, 0, 0)]
        error = upcast(lax.dynamic_slice(y, here, (count, length, *y.shape[2:])))
        given = planes(_flat(error), matrix, windows.of_planes, flat)
        shares = _added_up(given.reshape(count, length, *flat, taps, inputs), windows)
        seen = _seen(windows, first, count, start, shares.shape[1])
        return x.at[seen].add(shares, mode="drop", wrap_negative_indices=False)

    x = jnp.zeros((y.shape[0], *sizes, inputs), upcast(y).dtype)
    return _each_block(add, varying(x, y, w), y.shape[:2], at_once).astype(y.dtype)


def weights(
    planes: Callable[..., Array], x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]
) -> W:
    """`planes` is the product over two axes, of their x, y, windows and kernel."""
    (taps, *flat), inputs, outputs = kernel, x.shape[-1], y.shape[-1]
    inside = Geometry(windows.stride[1:], ((0, 0),) * 2, windows.dilation[1:], 1)

    def product(x: X, y: Y) -> Array:
        seen = _beside(x, windows, taps, y.shape[1])
        return planes(_flat(seen), _flat(y), inside, tuple(flat))

    wide = accumulation_dtype(x.dtype, y.dtype)
    zeros = jnp.zeros((*flat, taps * inputs, outputs), wide)
    most = min(PLACES, _places(x.shape, y.size, taps) * math.prod(y.shape[2:-1]))
    dw = in_blocks(product, x, y, windows, kernel, zeros, most)
    return jnp.moveaxis(dw.reshape(*flat, taps, inputs, outputs), 2, 0)


def _places(shape: tuple[int, ...], other: int, taps: int) -> int:
    """Of how many places planes of an array of this shape are laid out at a time."""
    most = min(TOGETHER, max(math.prod(shape), other) // 4)
    return max(1, most // (taps * math.prod(shape[2:])))


def _each_block(
    step: Callable[..., Array], carry: Array, sizes: tuple[int, ...], at_once: int
) -> Array:
    """`carry` after `step(carry, first, count, start, length)` over examples and places of each."""
    examples, places = sizes

    def of_examples(carry: Array, *some: Array | int) -> Array:
        return each_block(lambda carry, *at: step(carry, *some, *at), carry, places, at_once)

    return each_block(of_examples, carry, examples, at_once // places)


def _seen(
    windows: Geometry, first: Array | int, count: int, start: Array | int, span: int
) -> tuple[Array, Array]:
    """The planes of some examples from the first that a place sees: indices of the leading axes.

    Those beyond the ends are zeros around them, of which there is no copy.
    """
    example, place = (jnp.asarray(n, jnp.int32) for n in (first, start))
    plane = place * windows.stride[0] - windows.padding[0][0] + jnp.arange(span, dtype=jnp.int32)
    return (example + jnp.arange(count, dtype=jnp.int32))[:, None], plane


def _beside(own: X, windows: Geometry, taps: int, length: int) -> Float[Array, "B N R S C"]:
    """What some places see of the planes from the first one's on, K beside each other."""
    stride, dilation = windows.stride[0], windows.dilation[0]
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
