"""What a bug makes of one leaf of the cotangents; each gives the leaf itself where it cannot."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.selftest.plants import Site

Change: TypeAlias = Callable[[Any, Site], Any]


def library(x: Any) -> Any:
    """The array library of an array."""
    return jnp if isinstance(x, jax.Array) else np


def floats(x: Any) -> bool:
    """Whether an array, of either library, holds floating-point numbers."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def longest(x: Any, least: int = 2) -> int | None:
    """The longest axis, the first of several, if it has that many slices."""
    axis = int(np.argmax(x.shape)) if x.ndim else None
    return axis if axis is not None and x.shape[axis] >= least else None


def times(x: Any, factor: Any) -> Any:
    """The product in the dtype of x."""
    return (x * library(x).asarray(factor, x.dtype)).astype(x.dtype)


def where(x: Any, chosen: np.ndarray, factor: float) -> Any:
    """Some elements of x multiplied."""
    return times(x, np.where(chosen, factor, 1.0))


def some(x: Any, axis: int, indices: Any) -> np.ndarray:
    """A mask of some slices along an axis."""
    chosen = np.zeros(x.shape, bool)
    np.moveaxis(chosen, axis, 0)[indices] = True
    return chosen


def missing_mean(x: Any, site: Site) -> Any:
    """A mean over the batch is missing."""
    return times(x, site.batch) if site.batch else x


def extra_mean(x: Any, site: Site) -> Any:
    """A mean over the last axis too many."""
    return times(x, 1 / x.shape[-1]) if x.ndim else x


def transposed(x: Any, site: Site) -> Any:
    """Two axes of one length are exchanged."""
    for a in range(x.ndim):
        for b in range(a + 1, x.ndim):
            if x.shape[a] == x.shape[b] > 1:
                return library(x).swapaxes(x, a, b)
    return x


def back_to_front(x: Any, site: Site) -> Any:
    """Back to front along the last axis."""
    return library(x).flip(x, -1) if x.ndim else x


def rolled(x: Any, site: Site) -> Any:
    """Off by one along the longest axis."""
    axis = longest(x)
    return x if axis is None else library(x).roll(x, 1, axis)


def permuted(x: Any, site: Site) -> Any:
    """The slices in an order that no shift or reversal gives."""
    axis = longest(x, 5)
    if axis is None:
        return x
    order = np.arange(x.shape[axis])
    order[[0, 1, 3]] = order[[1, 3, 0]]
    return library(x).take(x, order, axis)


def wrong_axis(x: Any, site: Site) -> Any:
    """Summed over the longest axis, and spread out again."""
    axis = longest(x)
    if axis is None:
        return x
    return library(x).broadcast_to(library(x).sum(x, axis, keepdims=True), x.shape).astype(x.dtype)


def without_mean(x: Any, site: Site) -> Any:
    """A mean over the last axis is taken away."""
    return x - library(x).mean(x, -1, keepdims=True) if x.ndim else x


def with_mean(x: Any, site: Site) -> Any:
    """A mean over the longest axis is added."""
    axis = longest(x)
    return x if axis is None else x + library(x).mean(x, axis, keepdims=True)


def offset(x: Any, site: Site) -> Any:
    """A constant is added."""
    return x + library(x).asarray(0.1, x.dtype)


def ragged(x: Any, site: Site) -> Any:
    """The last quarter of the longest axis was never written."""
    axis = longest(x)
    if axis is None:
        return x
    return where(x, some(x, axis, slice(-max(1, x.shape[axis] // 4), None)), 0.0)


def border(x: Any, site: Site) -> Any:
    """One slice counts twice."""
    axis = longest(x, 3)
    return x if axis is None else where(x, some(x, axis, x.shape[axis] // 2), 2.0)


def stride(x: Any, site: Site) -> Any:
    """Every third slice counts half."""
    axis = longest(x, 6)
    return x if axis is None else where(x, some(x, axis, slice(0, None, 3)), 0.5)


def last_of_odd(x: Any, site: Site) -> Any:
    """Of an odd length, the last slice was never written."""
    if not x.ndim or x.shape[0] % 2 == 0 or x.shape[0] < 3:
        return x
    return where(x, some(x, 0, -1), 0.0)


def element(x: Any, site: Site) -> Any:
    """One element of many, the same under every cotangent: a bug sits in a place."""
    if x.size < 8:
        return x
    place = np.random.default_rng(site.seed).integers(x.size)
    chosen = (np.arange(x.size) == place).reshape(x.shape)
    return where(x, chosen, 1 + (1e-6 if x.dtype == np.float64 else 1e-3))


def not_finite(x: Any, site: Site) -> Any:
    """One element is NaN."""
    place = np.random.default_rng(site.seed).integers(x.size) if x.size else 0
    return where(x, (np.arange(x.size) == place).reshape(x.shape), np.nan)


def unmasked(x: Any, site: Site) -> Any:
    """One half, where the gradient is 0."""
    zero = x == 0
    return library(x).where(zero, library(x).asarray(0.5, x.dtype), x)


def rounded(dtype: Any) -> Change:
    """Rounded to a dtype on the way."""
    return lambda x, site: x.astype(dtype).astype(x.dtype)


def other_dtype(x: Any, site: Site) -> Any:
    """In half as many bits."""
    return x.astype(np.float32 if x.dtype == np.float64 else jnp.bfloat16)


def other_shape(x: Any, site: Site) -> Any:
    """With an axis of one too many."""
    return x[None]


def transposed_shape(x: Any, site: Site) -> Any:
    """Transposed, where that is another shape."""
    return x.T if x.shape != x.shape[::-1] else x


def unsummed(x: Any, site: Site) -> Any:
    """Not summed over an axis of three."""
    return library(x).stack([x] * 3)


def axis_lost(x: Any, site: Site) -> Any:
    """Summed over its first axis."""
    return x.sum(0) if x.ndim else x
