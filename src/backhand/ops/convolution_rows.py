"""Convolution over two axes with stride 1, its shifts along rows and along columns apart.

A tap (k, l) reads the place d k rows down and d l columns to the right. Only the second is laid out
beside each other before the product, the first is added up after it, lo zeros being in front:

    correlate    t[r, b, k, o] = sum_{l, i} x[r, b + d l - lo, i] w[k, l, i, o]
                 y[a, b, o]    = sum_k t[a + d k - lo, b, k, o]
    weights      w[k, l, i, o] = sum_{a, b} x[a + d k - lo, b, i] y[a, b - d l + lo, o]

So K + L copies are written and read in place of the K L that a place's columns are, for as many
places as stay in the cache. `scatter` is `correlate` on the way back. Both products of the error
need its shifted columns, y[a, b - d l + lo, o]: `scatter_and_weights` lays them out once.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, varying
from backhand.ops.convolution_blocks import block_size, by_examples
from backhand.ops.convolution_columns import in_blocks, places_at_once
from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_groups import by_groups
from backhand.ops.convolution_lax import turned
from backhand.ops.convolution_taps import padded

X = Float[Array, "B R S I"]
Y = Float[Array, "B P Q O"]
W = Float[Array, "K L J O"]

TOGETHER = 1 << 20
"""Elements that a product reads and gives at a time: 4 MB in float32. At most
three quarters of what the larger of input and output has, so that they are not what memory is
needed for."""

PART, IN_PARTS = 128, 96 * 96
"""Places that a product sums, of those that are added up in parts, and the most numbers that it
gives: 8x28x28x256 by 3x3 in 4 groups, of 192 x 192, took 3.5 times as long in parts."""


def correlate(x: X, w: W, windows: Geometry) -> Y:
    (down, right), (inputs, outputs) = w.shape[:2], w.shape[2:]
    (by_rows, by_columns), ((top, _), sides) = windows.dilation, windows.padding
    rows, columns = windows.places(x.shape[1:-1], w.shape[:2])
    matrix = jnp.transpose(w, (1, 2, 0, 3)).reshape(right * inputs, down * outputs)
    wide = accumulation_dtype(x.dtype)

    def run(x: X) -> Y:
        own = moved(x, 2, sides[0], x.shape[2] + sum(sides))
        firsts = (by_columns * k for k in range(right))
        seen = beside(lax.slice_in_dim(own, k, k + columns, axis=2) for k in firsts)
        found = lax.dot_general(seen, matrix, (((1,), (0,)), ((), ())), preferred_element_type=wide)
        found = found.reshape(*x.shape[:2], columns, down, outputs)
        parts = (found[..., k, :] for k in range(down))
        shifted = (moved(part, 1, top - by_rows * k, rows) for k, part in enumerate(parts))
        return functools.reduce(operator.add, shifted).astype(x.dtype)

    most = most_of(x.size, x.shape[0] * rows * columns * outputs)
    return by_examples(run, x, max(1, most // one_example(x.shape, w.shape[:2], outputs, windows)))


def one_example(
    shape: tuple[int, ...], kernel: tuple[int, ...], outputs: int, windows: Geometry
) -> int:
    """The elements that the product of one example, of x of this shape, reads and gives."""
    _, columns = windows.places(shape[1:-1], kernel)
    return shape[1] * columns * (kernel[1] * shape[-1] + kernel[0] * outputs)


def scatter(y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]) -> X:
    return correlate(y, turned(w, 1), windows.way_back(sizes, w.shape[:2]))


def weights(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> W:
    """Of any number of groups: block after block, and group after group of each.

    XLA's own of each group rounds 3 to 5 times as much where there are many places: 9.8e-7 for
    8x28x28x256 by 3x3 in 8 groups, 2.0e-7 so, in 1.6 of its time; in 2 groups in 0.6 of it.
    """
    (down, right), groups = kernel, windows.groups
    inputs, outputs = x.shape[-1] // groups, y.shape[-1] // groups
    (by_rows, by_columns), (_, (left, _)) = windows.dilation, windows.padding
    wide = accumulation_dtype(x.dtype, y.dtype)
    few = down * inputs * right * outputs <= IN_PARTS
    in_parts = groups > 1 and few and y.dtype == wide == jnp.float32

    def of_group(x: X, y: Y) -> Array:
        rows, columns = y.shape[1], x.shape[2]
        seen = (lax.slice_in_dim(x, by_rows * k, by_rows * k + rows, axis=1) for k in range(down))
        blamed = (moved(y, 2, by_columns * k - left, columns) for k in range(right))
        return (over_parts if in_parts else over_places)(seen, beside(blamed), wide)

    product = functools.partial(by_groups, of_group, groups)
    zeros = jnp.zeros((down * inputs, groups * right * outputs), wide)
    own = x.shape[-1] + y.shape[-1] if groups > 1 else 0  # with their padding, of all groups
    most = places_at_once(x, y, down * inputs + right * outputs + own)
    dw = in_blocks(product, x, y, by_rows_alone(windows), kernel, zeros, most)
    dw = dw.reshape(down, inputs, groups, right, outputs)
    return jnp.transpose(dw, (0, 3, 1, 2, 4)).reshape(down, right, inputs, groups * outputs)


def scatter_and_weights(x: X, y: Y, w: W, windows: Geometry) -> tuple[X, W]:
    """What `scatter` gives back to x, and what `weights` makes of x and y, block by block."""
    (down, right), (inputs, outputs) = w.shape[:2], w.shape[2:]
    (by_rows, by_columns), ((top, _), (left, _)) = windows.dilation, windows.padding
    (rows, columns), wide = x.shape[1:-1], accumulation_dtype(x.dtype, y.dtype)
    matrix = jnp.transpose(w, (1, 3, 0, 2)).reshape(right * outputs, down * inputs)

    def block(x: X, y: Y) -> tuple[X, Array]:
        own, places = padded(x, by_rows_alone(windows)), y.shape[1]
        firsts = (by_rows * k for k in range(down))
        seen = (lax.slice_in_dim(own, k, k + places, axis=1) for k in firsts)
        blamed = beside(moved(y, 2, by_columns * k - left, columns) for k in range(right))
        dw = over_places(seen, blamed, wide)
        given = lax.dot(blamed, matrix, preferred_element_type=wide)
        given = given.reshape(*y.shape[:2], columns, down, inputs)
        parts = (given[..., k, :] for k in range(down))
        shifted = (moved(part, 1, by_rows * k - top, rows) for k, part in enumerate(parts))
        return functools.reduce(operator.add, shifted).astype(x.dtype), dw

    def run(dw: Array, start: Array | int, size: int) -> tuple[Array, X]:
        dx, new = block(*(lax.dynamic_slice_in_dim(array, start, size) for array in (x, y)))
        return dw + new, dx

    size = block_size(x.shape[0], most_of(x.size, y.size) // one_example_back(x, w, windows))
    whole, rest = divmod(x.shape[0], size)
    zeros = varying(jnp.zeros((down * inputs, right * outputs), wide), x, y)
    starts = size * jnp.arange(whole, dtype=jnp.int32)
    dw, dx = lax.scan(lambda dw, start: run(dw, start, size), zeros, starts)
    dx = dx.reshape(whole * size, *x.shape[1:])
    if rest:
        dw, last = run(dw, whole * size, rest)
        dx = jnp.concatenate([dx, last])
    return dx, dw.reshape(down, inputs, right, outputs).swapaxes(1, 2)


def by_rows_alone(windows: Geometry) -> Geometry:
    """Windows that reach into zeros above and below alone: beside them a column adds nothing.

    Of 8 columns and a kernel of 3 those zeros would be a fifth of the product.
    """
    return dataclasses.replace(windows, padding=(windows.padding[0], (0, 0)))


def most_of(*sizes: int) -> int:
    """The elements that products of arrays of these sizes may read and give at a time."""
    return min(TOGETHER, 3 * max(sizes) // 4)


def one_example_back(x: X, w: W, windows: Geometry) -> int:
    """The elements that the products of `scatter_and_weights` read and give for one example."""
    (down, right), (inputs, outputs) = w.shape[:2], w.shape[2:]
    rows, columns = windows.places(x.shape[1:-1], (down, right))[0], x.shape[2]
    return rows * columns * (2 * down * inputs + right * outputs)


def over_places(seen: Iterator[X], blamed: Array, wide: jnp.dtype) -> Array:
    """The sum over places of what was seen, shift after shift, times the error in each column.

    XLA has no fast product of bfloat16 on CPU that sums over the rows of its left operand. That is
    turned here, where XLA would undo it but for the barrier: 64x8x8x128 by 3x3 to 128 took 0.5 of
    the time so, in float32 no less.
    """
    if blamed.dtype.itemsize >= 4:
        over = (((0,), (0,)), ((), ()))
        return lax.dot_general(beside(seen), blamed, over, preferred_element_type=wide)
    turned = [lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T) for x in seen]
    return lax.dot(jnp.concatenate(turned), blamed, preferred_element_type=wide)


def over_parts(seen: Iterator[X], blamed: Array, wide: jnp.dtype) -> Array:
    """The same of PART places each, added up.

    32x16x16x64 by 3x3 to 64 in 2 groups took 1.3 of the time, with 0.7 of the rounding.
    """
    own = beside(seen)
    size = block_size(len(own), PART)
    whole = len(own) // size * size
    a, b = (x[:whole].reshape(-1, size, x.shape[1]) for x in (own, blamed))
    parts = lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), preferred_element_type=wide)
    if whole == len(own):
        return parts.sum(0)
    over = (((0,), (0,)), ((), ()))
    rest = lax.dot_general(own[whole:], blamed[whole:], over, preferred_element_type=wide)
    return parts.sum(0) + rest


def beside(shifts: Iterator[Array]) -> Array:
    """Arrays (B, *S, C) as one matrix (B S, n C)."""
    joined = jnp.concatenate(list(shifts), -1)
    return joined.reshape(-1, joined.shape[-1])


def moved(x: Array, axis: int, by: int, length: int) -> Array:
    """`x` moved along an axis, cut or filled with zeros to a length."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (by, length - x.shape[axis] - by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)
