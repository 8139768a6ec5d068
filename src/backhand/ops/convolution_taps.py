"""What each tap of a kernel meets at all places: a slice of the padded input.

Where the kernel is some strides long, without gaps, the taps of one stride meet neighbours: they
can be read together.
"""

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.ops.convolution_geometry import Geometry


def padded(x: Float[Array, "B *S I"], windows: Geometry) -> Float[Array, "B *Z I"]:
    """The inputs between the zeros that windows reach into."""
    return jnp.pad(x, ((0, 0), *windows.padding, (0, 0)))


def taps(
    x: Float[Array, "B *S I"],
    places: Sequence[int],
    windows: Geometry,
    kernel: Sequence[int],
) -> Iterator[Float[Array, "B *P I"]]:
    """The inputs of each tap in turn, the last axis fastest; x is padded already."""
    strides = (1, *windows.stride, 1)
    for tap in itertools.product(*map(range, kernel)):
        first = [d * k for d, k in zip(windows.dilation, tap, strict=True)]
        last = [a + (p - 1) * s + 1 for a, p, s in zip(first, places, windows.stride, strict=True)]
        yield lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), strides)


def whole_strides(windows: Geometry, kernel: Sequence[int]) -> bool:
    """Whether the kernel is some strides long on each axis, without gaps."""
    axes = zip(kernel, windows.stride, strict=True)
    return set(windows.dilation) == {1} and not any(k % s for k, s in axes)


def strides(
    x: Float[Array, "B *S I"],
    places: Sequence[int],
    windows: Geometry,
    kernel: Sequence[int],
) -> Iterator[Float[Array, "B *P C"]]:
    """As `taps`, those of a stride beside each other: of `whole_strides`."""
    stride, rank = windows.stride, windows.rank
    split = [n for axis in zip(places, stride, strict=True) for n in axis]
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    for at in itertools.product(*(range(k // s) for k, s in zip(kernel, stride, strict=True))):
        first = [a * s for a, s in zip(at, stride, strict=True)]
        last = [(a + p) * s for a, p, s in zip(at, places, stride, strict=True)]
        seen = lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]))
        seen = seen.reshape(x.shape[0], *split, x.shape[-1]).transpose(order)
        yield seen.reshape(x.shape[0], *places, -1)


def tap_after_tap(
    dw: Float[Array, "C O"], windows: Geometry, kernel: Sequence[int]
) -> Float[Array, "*K I O"]:
    """A weight in the order of `strides` in that of `taps`."""
    rank, stride, outputs = windows.rank, windows.stride, dw.shape[-1]
    counts = [k // s for k, s in zip(kernel, stride, strict=True)]
    order = [axis for i in range(rank) for axis in (i, rank + i)]
    split = dw.reshape(*counts, *stride, -1, outputs).transpose(*order, 2 * rank, 2 * rank + 1)
    return split.reshape(*kernel, -1, outputs)
