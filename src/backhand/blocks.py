"""Gradients that are added to sums, a block of a weight at a time."""

import functools
from collections.abc import Iterable
from typing import Any

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

BLOCK = 1 << 15
"""A weight of at most so many elements is never cut into blocks."""

AT_ONCE, BESIDE_WAITING, TOGETHER = 0.57, 0.33, 0.1
"""How much of all gradients a block may be: where each is added as it comes; beside factors that
wait; and where all are added together, once they are known to be finite, for XLA may hold several.

Small blocks cost time: with 784-1024-1024-10 and micro-batches of 256 on 2 cores, a sum of whole
weights took 0.98 of the time of plain gradients, in blocks of half a weight 1.05, of a quarter
1.16, of a sixteenth 1.43. Blocks that are larger cost memory: 0.56 gradients above a plain step at
micro-batches of 32, whose factors wait, with whole weights, none with halves. Where nothing waits a
whole weight of 0.56 took 0.40, for the activations of the plain step are there as well.
"""


def block_size(sums: Iterable[Any], share: float) -> int:
    """The elements of a block that is a share of all sums."""
    return max(BLOCK, int(share * sum(total.size for total in sums)))


def plus(start: Array, contribution: Contribution, param: Array, block: int = BLOCK) -> Array:
    """`start`, a sum of gradients of `param`, plus one more.

    On CPU a weight larger than `block` elements is added to in blocks, so that no second array of
    its size is ever there.
    """

    def at_once(start: Array, contribution: Contribution) -> Array:
        return start + total(contribution, start)

    if not has_examples(contribution):
        return start
    if explicit_sharding(param) is not None:
        return at_once(start, contribution)
    return lax.platform_dependent(
        start, contribution, cpu=functools.partial(_in_blocks, block), default=at_once
    )


def added(start: Array, waiting: Contribution, param: Array, block: int = BLOCK) -> Array:
    """`start` plus the gradient of contributions stacked on a leading axis G, as one batch G B."""
    depth = param.ndim - rank_of(waiting, param)
    batch = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, depth), waiting)
    return plus(start, batch, param, block)


def _in_blocks(block: int, start: Array, contribution: Contribution) -> Array:
    """`start` plus the gradient, a block of a weight's rows at a time."""
    if start.ndim > rank_of(contribution, start):

        def layer(index: Array, sums: Array) -> Array:
            own, c = jax.tree.map(lambda leaf: leaf[index], (sums, contribution))
            return lax.dynamic_update_index_in_dim(sums, _in_blocks(block, own, c), index, 0)

        return lax.fori_loop(0, start.shape[0], layer, start)
    match contribution:
        case Many():
            return functools.reduce(
                functools.partial(_in_blocks, block), uses_of(contribution), start
            )
        case Rows(ids, dy):
            return start.at[ids].add(dy.astype(start.dtype))
        case Outer(x, dy):
            factors = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, dy))
            return _product_in_blocks(block, start, *factors)
        case _:
            return start + total(contribution, start)


def _product_in_blocks(block: int, start: Array, x: Array, dy: Array) -> Array:
    """`start` plus x^T dy of (N, I) and (N, O): in equal blocks where a number nearby divides."""
    inputs = start.shape[0]
    least = min(inputs, -(-start.size // block))
    if least < 2:
        return start + total(Outer(x, dy), start)
    count = next((n for n in range(least, 2 * least) if inputs % n == 0), least)
    rows = inputs // count

    def add(index: Array | int, sums: Array, size: int = rows) -> Array:
        part = Outer(lax.dynamic_slice_in_dim(x, index * rows, size, 1), dy)
        own = lax.dynamic_slice_in_dim(sums, index * rows, size)
        return lax.dynamic_update_slice_in_dim(sums, own + total(part, own), index * rows, 0)

    sums, rest = lax.fori_loop(0, count, add, start), inputs - count * rows
    return add(count, sums, rest) if rest else sums
