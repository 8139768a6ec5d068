"""Gradients that are added to sums, a block of a weight at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import explicit_sharding
from backhand.contributions import (
    Contribution,
    Many,
    Outer,
    Rows,
    has_examples,
    rank_of,
    total,
    uses_of,
)

LARGE, BLOCK = 1 << 16, 1 << 18
"""Elements of a weight whose gradient is summed in blocks on CPU, and of a block at most.

A block has 1 MB, within a core's L2, and a quarter of the weight. On 2 cores a block at a time took
0.99 to 1.04 of the time of a whole product.
"""


def plus(start: Array, contribution: Contribution, param: Array) -> Array:
    """`start`, a sum of gradients of `param`, plus one more.

    On CPU a large weight is added to in blocks that stay in the cache, so that no second array of
    its size is ever there.
    """

    def at_once(start: Array, contribution: Contribution) -> Array:
        return start + total(contribution, start)

    if not has_examples(contribution):
        return start
    if explicit_sharding(param) is not None:
        return at_once(start, contribution)
    return lax.platform_dependent(start, contribution, cpu=_in_blocks, default=at_once)


def added(start: Array, waiting: Contribution, param: Array) -> Array:
    """`start` plus the gradient of contributions stacked on a leading axis G, as one batch G B."""
    depth = param.ndim - rank_of(waiting, param)
    return plus(start, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, depth), waiting), param)


def _in_blocks(start: Array, contribution: Contribution) -> Array:
    """`start` plus the gradient, a block of a weight's rows at a time."""
    if start.ndim > rank_of(contribution, start):

        def layer(index: Array, sums: Array) -> Array:
            own, c = jax.tree.map(lambda leaf: leaf[index], (sums, contribution))
            return lax.dynamic_update_index_in_dim(sums, _in_blocks(own, c), index, 0)

        return lax.fori_loop(0, start.shape[0], layer, start)
    match contribution:
        case Many():
            return functools.reduce(_in_blocks, uses_of(contribution), start)
        case Rows(ids, dy):
            return start.at[ids].add(dy.astype(start.dtype))
        case Outer(x, dy):
            return _product_in_blocks(start, x, dy)
        case _:
            return start + total(contribution, start)


def _product_in_blocks(start: Array, x: Array, dy: Array) -> Array:
    """`start` plus the product of an `Outer`: in equal blocks where a number nearby divides."""
    inputs = start.shape[0]
    least = min(inputs, max(4 if start.size >= LARGE else 1, -(-start.size // BLOCK)))
    if least < 2:
        return start + total(Outer(x, dy), start)
    count = next((n for n in range(least, 2 * least) if inputs % n == 0), least)
    rows = inputs // count

    def block(index: Array | int, sums: Array, size: int = rows) -> Array:
        part = Outer(lax.dynamic_slice_in_dim(x, index * rows, size, x.ndim - 1), dy)
        own = lax.dynamic_slice_in_dim(sums, index * rows, size)
        return lax.dynamic_update_slice_in_dim(sums, own + total(part, own), index * rows, 0)

    sums, rest = lax.fori_loop(0, count, block, start), inputs - count * rows
    return block(count, sums, rest) if rest else sums
