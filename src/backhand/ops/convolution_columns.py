"""The weight's gradient of a convolution, a block of places at a time.

The columns of a place are the inputs that its window sees, tap after tap. With those of all places
for the rows of a matrix the sum over places is one product:

    dw (K I, O) = columns (places, K I)^T dy (places, O)

The columns of a whole batch are K times as large as the input, and take longer to write and read
than the product to compute. So they are made for as many places as stay in the cache, block after
block, and the products added up. Where a window begins where the last one ends they are the input
itself in another order.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, varying
from backhand.ops.convolution_blocks import each_block
from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_taps import padded, strides, tap_after_tap, taps, whole_strides

X = Float[Array, "B *S I"]
Y = Float[Array, "B *P O"]
W = Float[Array, "*K J O"]

COLUMNS = 1 << 19
"""Elements laid out at a time: 2 MB in float32, about a core's cache. At most half as many as the
larger of input and error has, so that they are not what memory is needed for."""

BLOCK = 1 << 17
"""Elements of columns and error at a time, where they are multiplied at once: 0.5 MB in float32."""

BLOCKS = 512
"""How many blocks there are at most, so that what it takes to begin one is not what time is spent
on. 0.3 ms for 8192 places of 48 elements became 1.1 ms in 512 blocks, and 2 MB became 20 kB."""

FEW = 16
"""Channels below which all taps of a stride are read together: 32x32x32x3 by 4x4 with stride 2 took
0.8 of the time of one by one, 32x16x16x64 1.3 of it."""


def weights_by_columns(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> W:
    """The sum over places as products of matrices, of one group."""
    inputs, outputs, wide = x.shape[-1], y.shape[-1], accumulation_dtype(x.dtype, y.dtype)
    size, places = math.prod(kernel) * inputs, y.size // max(1, outputs)
    together = whole_strides(windows, kernel) and (inputs < FEW or kernel == windows.stride)
    pieces = math.prod(kernel) // (math.prod(windows.stride) if together else 1)

    def product(x: X, y: Y) -> Array:
        seen = (strides if together else taps)(x, y.shape[1:-1], windows, kernel)
        columns = jnp.concatenate([piece.reshape(y[..., 0].size, -1) for piece in seen], -1)
        over, error = (((0,), (0,)), ((), ())), y.reshape(-1, outputs)
        return lax.dot_general(columns, error, over, preferred_element_type=wide)

    if pieces == 1 and size * places <= min(COLUMNS, max(x.size, y.size)):
        dw = product(padded(x, windows), y)  # outside of a loop XLA can lay them where y will be
    else:
        most = max(size // 4, 6 * pieces, places // BLOCKS)
        zeros = jnp.zeros((size, outputs), wide)
        most = min(most, BLOCK // (size + outputs))
        dw = in_blocks(product, x, y, windows, kernel, zeros, most)
    if together:
        return tap_after_tap(dw, windows, kernel)
    return dw.reshape(*kernel, inputs, outputs)


def places_at_once(x: X, y: Y, laid_out: int) -> int:
    """How many places a block has of which so many elements each are laid out."""
    return min(COLUMNS, max(x.size, y.size) // 2) // max(1, laid_out)


def in_blocks(
    product: Callable[[X, Y], Array],
    x: X,
    y: Y,
    windows: Geometry,
    kernel: tuple[int, ...],
    zeros: Array,
    most: int,
) -> Array:
    """The sum of `product(padded x, y)` over blocks of examples, or of rows of one if it is large.

    Args:
        product: of a few places and all inputs that their windows see.
        x: inputs.
        y: their error.
        windows: where they lie.
        kernel: its sizes.
        zeros: what the sum begins with.
        most: places of a block, at least a row.
    """
    rows, most = y.shape[1], most // math.prod(y.shape[2:-1])
    stride, reach = windows.stride[0], windows.reach(kernel)[0]
    front, rest = windows.padding[0][0], y.shape[2:]

    def of_examples(sums: Array, first: Array | int, count: int) -> Array:
        if most >= rows:
            own = padded(lax.dynamic_slice_in_dim(x, first, count), windows)
            return sums + product(own, lax.dynamic_slice_in_dim(y, first, count))

        def of_rows(sums: Array, start: Array | int, count: int) -> Array:
            example, row, *zero = (jnp.asarray(n, jnp.int32) for n in (first, start, 0))
            read = row * stride - front + jnp.arange((count - 1) * stride + reach, dtype=jnp.int32)
            at = x.at[example, read]
            seen = at.get(mode="fill", fill_value=0, wrap_negative_indices=False)[None]
            seen = jnp.pad(seen, ((0, 0), (0, 0), *windows.padding[1:], (0, 0)))
            blamed = lax.dynamic_slice(y, (example, row, *zero * len(rest)), (1, count, *rest))
            return sums + product(seen, blamed)

        return each_block(of_rows, sums, rows, most)

    return each_block(of_examples, varying(zeros, x, y), x.shape[0], most // rows)
