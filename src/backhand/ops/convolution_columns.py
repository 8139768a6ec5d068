"""The weight's gradient of a convolution, a block of places at a time.

The columns of a place are the inputs that its window sees, tap after tap. With those of all places
for the rows of a matrix the sum over places is one product:

    dw (K I, O) = columns (places, K I)^T dy (places, O)

The columns of a whole batch are K times as large as the input, and take longer to write and read
than the product to compute. So they are made for as many places as stay in the cache, block after
block, and the products added up.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, varying
from backhand.ops.convolution_blocks import summed
from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_taps import padded, taps

X = Float[Array, "B *S I"]
Y = Float[Array, "B *P O"]
W = Float[Array, "*K J O"]

COLUMNS = 1 << 19
"""Elements of the columns at a time: 2 MB in float32, about a core's cache. At most half as many as
the larger of input and error has, so that they are not what memory is needed for."""


def weights_by_columns(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> W:
    """The sum over places as products of matrices, of one group."""
    inputs, outputs, wide = x.shape[-1], y.shape[-1], accumulation_dtype(x.dtype, y.dtype)

    def product(x: X, y: Y) -> Array:
        seen = taps(x, y.shape[1:-1], windows, kernel)
        columns = jnp.concatenate([tap.reshape(-1, inputs) for tap in seen], -1)
        over, error = (((0,), (0,)), ((), ())), y.reshape(-1, outputs)
        return lax.dot_general(columns, error, over, preferred_element_type=wide)

    size = math.prod(kernel) * inputs
    dw = in_blocks(product, x, y, windows, kernel, jnp.zeros((size, outputs), wide), size)
    return dw.reshape(*kernel, inputs, outputs)


def in_blocks(
    product: Callable[[X, Y], Array],
    x: X,
    y: Y,
    windows: Geometry,
    kernel: tuple[int, ...],
    zeros: Array,
    laid_out: int,
) -> Array:
    """The sum of `product(padded x, y)` over blocks of examples, or of rows of one if it is large.

    Args:
        product: of a few places and all inputs that their windows see.
        x: inputs.
        y: their error.
        windows: where they lie.
        kernel: its sizes.
        zeros: what the sum begins with.
        laid_out: elements that the product lays out for a place.
    """
    rows, a_row = y.shape[1], max(laid_out, 1) * math.prod(y.shape[2:-1])
    most = min(COLUMNS, max(x.size, y.size) // 2) // a_row
    zeros = varying(zeros, x, y)
    stride, reach = windows.stride[0], windows.reach(kernel)[0]

    def of_examples(first: Array | int, count: int) -> Array:
        own = padded(lax.dynamic_slice_in_dim(x, first, count), windows)
        if most >= rows:
            return product(own, lax.dynamic_slice_in_dim(y, first, count))

        def of_rows(start: Array | int, count: int) -> Array:
            seen = lax.dynamic_slice_in_dim(own, start * stride, (count - 1) * stride + reach, 1)
            rest = y.shape[2:]
            at = [jnp.asarray(index, jnp.int32) for index in (first, start, *[0] * len(rest))]
            blamed = lax.dynamic_slice(y, at, (1, count, *rest))
            return product(seen, blamed)

        return summed(of_rows, rows, most, zeros)

    return summed(of_examples, x.shape[0], most // rows, zeros)
