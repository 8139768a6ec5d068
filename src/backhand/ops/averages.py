"""Means over the groups that normalizations take their statistics of, made of sums."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from backhand.arrays import explicit_sharding, last_axis, product, reshape_examples


class Average(NamedTuple):
    """The mean over the elements of a group, in two steps.

    Attributes:
        sums: what a parameter's error, a sum over everything, and the mean have in common: sums of
            an example, or x itself.
        mean: `(sums, scale=1) -> mean`, each feature times its scale (D,).
    """

    sums: Callable[[Array], Array]
    mean: Callable[..., Array]

    def __call__(self, x: Array) -> Array:
        """The mean of x."""
        return self.mean(self.sums(x))


def over_features(x: Array) -> Average:
    """The mean over the last axis."""
    count = max(1, x.shape[-1])

    def by_sum(x: Array, scale: Array) -> Array:
        return _sum(x * last_axis(scale, x), (x.ndim - 1,))

    def by_product(x: Array, scale: Array) -> Array:
        """Without an array of x scale, which XLA on CPU would write to memory before its sum."""
        return product(x, scale[:, None])

    def mean(x: Array, scale: Array | None = None) -> Array:
        if scale is None:
            return _sum(x, (x.ndim - 1,)) / count
        if explicit_sharding(x) is not None:
            return by_sum(x, scale) / count
        return lax.platform_dependent(x, scale, cpu=by_product, default=by_sum) / count

    return Average(lambda x: x, mean)


def over_batch(x: Array, mask: Array | None = None) -> Average:
    """The sum over all axes but the last, over the number of positions in the mask."""
    axes = tuple(range(x.ndim - 1))
    count: Any = max(1, math.prod(x.shape[:-1]))
    if mask is not None:
        count = jnp.maximum(1, jnp.sum(mask))

    def mean(x: Array, scale: Array | None = None) -> Array:
        own = _sum(x, axes) / jnp.asarray(count, x.dtype)
        return own if scale is None else own * last_axis(scale, own)

    return Average(lambda x: x, mean)


def over_groups(x: Array, groups: int) -> Average:
    """The mean over all of an example and each of the groups of its features, for each feature.

    Per feature first, whose sums run along the rows of memory.
    """
    axes, size = tuple(range(1, x.ndim - 1)), x.shape[-1] // groups
    count = max(1, math.prod(x.shape[1:-1]) * size)

    def mean(sums: Array, scale: Array | None = None) -> Array:
        each = sums if scale is None else sums * last_axis(scale, sums)
        if size == 1:
            return each / count
        own = reshape_examples(each, (groups, size))
        found = jnp.broadcast_to(_sum(own, (2,)) / count, own.shape)
        return reshape_examples(found, each.shape[1:])

    return Average(lambda x: _sum(x, axes), mean)


def _sum(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum over `axes`, which stay with length 1.

    XLA on CPU would draw what is made of at least 4,096 sums into one slow kernel with them, up to
    all of dx: 3 ms rather than 0.5. It stops at a choice, and does not see that this one changes
    nothing.
    """
    total = jnp.sum(x, axes, keepdims=True)
    return jnp.where(total == total, total, jnp.nan)
