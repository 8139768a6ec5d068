"""Products of channels in groups, one group after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import varying


def by_groups(product: Callable[..., Any], groups: int, *arrays: Array) -> Any:
    """`product` of each group's channels, side by side.

    Args:
        product: from arrays with the channels of one group on their last axes to such arrays.
        groups: how many there are.
        arrays: with the channels of all groups on their last axes.
    """

    def of(index: Array | int) -> Any:
        return product(*(_part(array, index, array.shape[-1] // groups) for array in arrays))

    def add(index: Array, so_far: Any) -> Any:
        return jax.tree.map(lambda whole, part: _put(whole, part, index), so_far, of(index))

    def empty(part: Any) -> Array:
        return jnp.zeros((*part.shape[:-1], groups * part.shape[-1]), part.dtype)

    zeros = jax.tree.map(empty, jax.eval_shape(lambda: of(0)))
    return lax.fori_loop(0, groups, add, varying(zeros, *arrays))


def _part(array: Array, index: Array | int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(array, index * size, size, array.ndim - 1)


def _put(whole: Array, part: Array, index: Array) -> Array:
    start = index * part.shape[-1]
    return lax.dynamic_update_slice_in_dim(whole, part, start, whole.ndim - 1)
