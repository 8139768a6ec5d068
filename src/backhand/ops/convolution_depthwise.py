"""Depthwise convolution: each channel by itself, as shifted multiply-adds.

    correlate    y[p, i, m] = sum_k x[q, i] w[k, i, m]
    scatter      x[q, i]    = sum_{k, m} y[p, i, m] w[k, i, m]
    weights      w[k, i, m] = sum_p x[q, i] y[p, i, m]

A tap has one number for each channel, so there is no product of matrices to be had. What there is
are a few sums of slices, which read the input once from memory, a few examples at a time.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, last_axis, upcast
from backhand.ops.convolution_blocks import by_examples
from backhand.ops.convolution_columns import in_blocks
from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_taps import padded, taps

X = Float[Array, "B *S I"]
Y = Float[Array, "B *P O"]
W = Float[Array, "*K 1 O"]

BLOCK = 1 << 17
"""Elements of input or output at a time: 0.5 MB in float32. At most a quarter of what there are, so
that the zeros around them are not what memory is needed for."""

JOINED = 1 << 18
"""Elements of error at a time of which a weight's gradient is made: 1 MB in float32. At most a
quarter of what the larger of input and error has."""

ROWS, SLICES = 32, 512
"""Rows, or over one axis pieces of it, whose products are written out; fewer of wide kernels, whose
slices would make a program too long."""

TOGETHER = 16
"""Taps up to which those of all rows of a kernel are written out: a loop over the rows took 1.1 to
1.9 of the time, and for 7x7 a third of the time to compile."""

SMALL = 1 << 10
"""Elements that are not taken apart: 4 kB in float32."""

WRITTEN_OUT = 144
"""Taps, times outputs, that are summed one by one."""


def correlate(x: X, w: W, windows: Geometry) -> Y:
    kernel, outputs = w.shape[:-2], w.shape[-1]
    places = windows.places(x.shape[1:-1], kernel)
    times = outputs // x.shape[-1]

    def run(x: X) -> Y:
        seen = taps(padded(upcast(x), windows), places, windows, kernel)
        return _weighted((_repeated(tap, times) for tap in seen), w).astype(x.dtype)

    return by_examples(run, x, _examples(x.shape, outputs))


def scatter(y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]) -> X:
    """Around each place of y are stride - 1 zeros; over those the kernel moves turned round."""
    kernel, outputs = w.shape[:-2], w.shape[-1]
    turned = jnp.flip(w, range(windows.rank))
    back = windows.way_back(sizes, kernel)
    pads = [(lo, hi, s - 1) for (lo, hi), s in zip(back.padding, windows.stride, strict=True)]

    def run(y: Y) -> X:
        wide = upcast(y)
        apart = lax.pad(wide, jnp.zeros((), wide.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
        times = outputs // windows.groups
        if not _apart(kernel, times):
            given = _weighted(taps(apart, sizes, back, kernel), turned)
            parts = (given[..., own::times] for own in range(times))
            return functools.reduce(operator.add, parts).astype(y.dtype)
        pairs = ((apart[..., own::times], turned[..., own::times]) for own in range(times))
        each = (_weighted(taps(error, sizes, back, kernel), own) for error, own in pairs)
        return functools.reduce(operator.add, each).astype(y.dtype)

    return by_examples(run, y, _examples((y.shape[0], *sizes, 1), outputs))


def weights(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> W:
    times, taps = y.shape[-1] // x.shape[-1], math.prod(kernel)

    def product(x: X, y: Y) -> Array:
        seen, error = upcast(x), upcast(y)
        if times == 1:
            return _joined(seen, error, windows, kernel)
        apart = jnp.moveaxis(error.reshape(*y.shape[:-1], -1, times), -1, 0)
        each = lax.map(lambda own: _joined(seen, own, windows, kernel), apart)
        return jnp.moveaxis(each, 0, -1).reshape(taps, -1)

    zeros = jnp.zeros((taps, y.shape[-1]), accumulation_dtype(x.dtype, y.dtype))
    rows = _rows(kernel) if windows.rank > 1 else max(ROWS, y.shape[1])
    most = min(JOINED, max(x.size, y.size) // 4) // max(1, y.shape[-1])
    most = min(most, rows * math.prod(y.shape[2:-1]))
    dw = in_blocks(product, x, y, windows, kernel, zeros, most)
    return dw.reshape(*kernel, 1, y.shape[-1])


def _joined(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> Float[Array, "K I"]:
    """What each tap joined: of padded inputs, and an error for each channel.

    The products of all rows are added up in one loop over a row, which writes little. XLA's own sum
    over all leading axes took 2 to 5 times as long.
    """
    examples, rows, *across = y.shape[:-1]
    stride, at_once = windows.stride[0], -(-rows // _rows(kernel))
    whole = rows // at_once * at_once

    def of_row(k: Array | int) -> Array:
        """Of the taps in a row of the kernel."""
        first, reach = windows.dilation[0] * k, (rows - 1) * stride + 1
        own = lax.dynamic_slice_in_dim(x, first, reach, 1)

        def terms(example: int, row: int, count: int) -> list[Array]:
            error = y[example : example + 1, row : row + count]
            seen = own[example : example + 1, row * stride : (row + count - 1) * stride + 1]
            each = taps(seen, (count, *across), windows, (1, *kernel[1:]))
            return [tap * error for tap in each]

        def sums(starts: Iterable[int], count: int) -> Array:
            each = (terms(*at, count) for at in itertools.product(range(examples), starts))
            of_taps = (functools.reduce(operator.add, tap) for tap in zip(*each, strict=True))
            return jnp.concatenate([_over_places(tap) for tap in of_taps])

        found = sums(range(0, whole, at_once), at_once)
        return found if whole == rows else found + sums([whole], rows - whole)

    if math.prod(kernel) <= TOGETHER:
        return jnp.concatenate([of_row(k) for k in range(kernel[0])])
    each = lax.map(of_row, jnp.arange(kernel[0], dtype=jnp.int32))
    return each.reshape(-1, y.shape[-1])


def _rows(kernel: Sequence[int]) -> int:
    """How many rows, or pieces of one axis, are written out."""
    together = math.prod(kernel) <= TOGETHER
    return max(1, min(ROWS, SLICES // math.prod(kernel if together else kernel[1:])))


def _over_places(x: X) -> Float[Array, "1 I"]:
    """The sum over all axes but the last, as a product: XLA's sums take longer."""
    rows = x.reshape(-1, x.shape[-1])
    return lax.dot(jnp.ones((1, rows.shape[0]), x.dtype), rows)


def _apart(kernel: Sequence[int], times: int) -> bool:
    """Whether the outputs of a channel are taken one after another: each is written out.

    8x28x28x32 by 3x3 to 2 outputs each took 0.15 of the time of all together, to 8 outputs 0.4, to
    32 it took 2 times as long, and longer to compile.
    """
    return math.prod(kernel) * times <= WRITTEN_OUT


def _weighted(seen: Iterator[Array], w: W) -> Array:
    """The sum of what each tap meets, times the tap's number for the channel."""
    numbers = upcast(w).reshape(-1, w.shape[-1])
    terms = (tap * last_axis(own, tap) for tap, own in zip(seen, numbers, strict=True))
    return functools.reduce(operator.add, terms)


def _repeated(x: Array, times: int) -> Array:
    """Each channel as often as it has outputs."""
    return x if times == 1 else jnp.repeat(x, times, -1)


def _examples(shape: Sequence[int], channels: int) -> int:
    """How many examples a block has."""
    one = math.prod(shape[1:-1]) * channels
    return max(1, min(BLOCK, max(shape[0] * one // 4, SMALL)) // one)
