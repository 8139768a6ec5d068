"""Products of channels in groups, one group after another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import varying


def by_groups(product: Callable[..., Array], groups: int, *arrays: Array) -> Array:
    """`product` of each group's channels, side by side: all are on last axes.

    Args:
        product: from arrays with the channels of one group to such an array.
        groups: how many there are.
        arrays: with the channels of all groups.
    """

    def of(index: Array | int) -> Array:
        return product(*(_part(array, index, array.shape[-1] // groups) for array in arrays))

    def add(index: Array, so_far: Array) -> Array:
        found = of(index)
        start = index * found.shape[-1]
        return lax.dynamic_update_slice_in_dim(so_far, found, start, found.ndim - 1)

    if groups == 1:
        return product(*arrays)
    one = jax.eval_shape(lambda: of(0))
    zeros = jnp.zeros((*one.shape[:-1], groups * one.shape[-1]), one.dtype)
    return lax.fori_loop(0, groups, add, varying(zeros, *arrays))


def _part(array: Array, index: Array | int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(array, index * size, size, array.ndim - 1)
