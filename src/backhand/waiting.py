"""What is added to a sum at once, and what waits.

A sum is read and written for each micro-batch, which costs more than the product that is added to
it where micro-batches are small beside the weights. There the factors of the product are small too:
those of a group of micro-batches wait, and are summed in one product.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import is_floating, upcast
from backhand.blocks import AT_ONCE, block_size, plus
from backhand.contributions import KINDS, Contribution, Many, has_examples, map_owners, total
from backhand.visit import Collector, Params, PyTree, Summed, Visit

WAITING = 1 / 3
"""How much memory the factors that wait may take, in gradients.

784-1024-1024-10, 8 micro-batches of 32, whose factors take 0.08 gradients each, on 2 cores: 1.14
times the time of 8 plain gradients with each added by itself, 1.00 in groups of 2, 0.97 of 4.
"""


def waits(param: Any, contribution: Any) -> bool:
    """Whether a contribution is worth keeping unsummed: two fit into `WAITING`."""
    if not isinstance(contribution, KINDS) or not has_examples(contribution):
        return False
    small = 0 < 2 * bytes_of(contribution) <= WAITING * bytes_of(param)
    return small and is_floating(param)


def adding(onto: Mapping[int, Array], waiting: bool = False) -> Collector:
    """The gradient, each parameter's added to its sum as soon as it is known.

    Args:
        onto: the sums, by the identity of their parameters; without one, the gradient by itself.
        waiting: whether contributions that are small enough wait.
    """
    block = block_size(onto.values(), AT_ONCE)

    def leaf(param: Any, contribution: Contribution) -> Any:
        if waiting and waits(param, contribution):
            return contribution
        if id(param) not in onto:
            return total(contribution, param)
        return Summed(plus(onto[id(param)], contribution, param, block))

    def read(visit: Visit) -> PyTree:
        return map_owners(leaf, visit.params, visit.contributions)

    return Collector(read, degree=1, onto=onto)


@dataclasses.dataclass(frozen=True)
class Unsummed:
    """Factors of a gradient, to be added to a sum; no tree of arrays, like `Summed`."""

    contribution: Contribution

    def finite(self) -> Array:
        """Whether the gradient is finite, by a bound: no sum of the products can overflow."""
        return surely_finite(self.contribution)

    def kept(self, fine: Array) -> "Unsummed":
        """The same where `fine`; else factors of zero."""
        return Unsummed(kept(self.contribution, fine))


def unsummed(waiting: bool) -> Collector:
    """The gradient, or the factors that make it where they take no more memory.

    They say whether the gradient is finite before there is one, and before anything was added to a
    sum. A float16 gradient, which overflows where a float32 sum does not, is made.
    """

    def leaf(param: Any, contribution: Contribution) -> Any:
        if waiting and waits(param, contribution):
            return contribution
        small = isinstance(contribution, KINDS) and has_examples(contribution)
        small = small and is_floating(param) and bytes_of(contribution) <= bytes_of(param)
        wide = small and jnp.finfo(param.dtype).max >= jnp.finfo(jnp.bfloat16).max
        return contribution if wide else total(contribution, param)

    return Collector(lambda visit: map_owners(leaf, visit.params, visit.contributions), degree=1)


def surely_finite(contribution: Contribution) -> Array:
    """Whether factors are finite, and too small for a sum of their products to overflow."""
    if isinstance(contribution, Many):
        parts = [surely_finite(part) for part in contribution.parts if part is not None]
        return jnp.all(jnp.stack(parts))
    factors = [leaf for leaf in jax.tree.leaves(contribution) if is_floating(leaf)]
    largest = [jnp.max(jnp.abs(upcast(leaf)), initial=0) for leaf in factors]
    return jnp.isfinite(math.prod(largest, start=float(factors[-1].size)))


def kept(tree: PyTree, fine: Array) -> PyTree:
    """The same where `fine`; else zeros."""
    return jax.tree.map(
        lambda x: (
            x.kept(fine) if isinstance(x, Unsummed) else jnp.where(fine, x, jnp.zeros_like(x))
        ),
        tree,
    )


def without_waiting(params: Params, collected: PyTree) -> tuple[PyTree, PyTree]:
    """What waits, and the gradients of the other parameters; None for the others in each."""
    waiting = map_owners(lambda p, c: c if waits(p, c) else None, params, collected)
    return waiting, map_owners(lambda p, c: None if waits(p, c) else c, params, collected)


def marked(params: Params, collected: PyTree) -> PyTree:
    """The same with contributions as `Unsummed`."""
    return map_owners(lambda _, c: Unsummed(c) if isinstance(c, KINDS) else c, params, collected)


def with_products(params: Params, grads: PyTree, products: PyTree) -> PyTree:
    """Undoes `without_waiting` once what waited is summed."""
    return map_owners(
        lambda _, g, product: g if product is None else product, params, grads, products
    )


def by_identity(params: Params, sums: PyTree) -> dict[int, Array]:
    """The sums of gradients by the identity of their parameters, for `Collector.onto`."""
    found: dict[int, Array] = {}

    def note(param: Any, total: Any) -> None:
        if isinstance(total, Array):
            found[id(param)] = total

    map_owners(note, params, sums)
    return found


def grouping(params: Params, collected: PyTree) -> int:
    """How many micro-batches may wait for each other; 1 if none do.

    Args:
        params: the parameters.
        collected: what `adding` collects of one micro-batch, or its shapes.
    """
    waiting, _ = without_waiting(params, collected)
    if not jax.tree.leaves(waiting):
        return 1
    return max(1, int(WAITING * bytes_of(params) / max(1, bytes_of(waiting))))


def bytes_of(tree: PyTree) -> int:
    """The bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
