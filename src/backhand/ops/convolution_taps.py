"""What each tap of a kernel meets at all places: a slice of the padded input."""

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
