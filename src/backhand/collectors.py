"""What can be gathered on the way back besides the gradient, on the same traversal."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import one_by_one, upcast
from backhand.contributions import KINDS, Contribution, Moments, inner_products, map_owners
from backhand.visit import Collector, Params, PyTree, Visit


def _square_norms(visit: Visit) -> PyTree:
    leaves = jax.tree.leaves((visit.dy, visit.residuals))
    batch = next(leaf.shape[0] for leaf in leaves if leaf.ndim)  # without any blame, dy is None
    one_by_one = functools.cache(lambda: iter(jax.tree.leaves(_one_by_one(visit, batch))))

    def read(param: Any, contribution: Contribution) -> Array:
        if contribution is None or isinstance(contribution, Moments):
            return jnp.zeros(batch)
        if isinstance(contribution, KINDS):
            return inner_products(contribution, contribution, param)
        return next(one_by_one())

    return map_owners(read, visit.params, visit.contributions)


def _one_by_one(visit: Visit, batch: int) -> list[Array]:
    """Square norms (B,) for each plain array that the rule gives, run on one example at a time."""
    saved = jax.tree.leaves((visit.residuals, visit.dy))
    if visit.rule is None or any(leaf.ndim == 0 or leaf.shape[0] != batch for leaf in saved):
        raise ValueError(
            "per-example norms need a rule that leaves its parameters' cotangents unsummed "
            "(Outer, Total, Rows, Windows), or residuals that all have the batch as their first "
            f"axis; got residuals of shapes {[leaf.shape for leaf in saved]} for a batch of {batch}"
        )
    warnings.warn(
        "a rule gives summed arrays, not contributions: its per-example norms are computed one "
        "example at a time; return Outer, Total, Rows or Windows instead",
        stacklevel=2,
    )

    rule = visit.rule

    def example(saved: tuple[PyTree, PyTree]) -> list[Array]:
        residuals, dy = jax.tree.map(lambda leaf: leaf[None], saved)
        norms: list[Array] = []

        def read(param: Any, contribution: Contribution) -> None:
            if not (contribution is None or isinstance(contribution, KINDS)):
                norms.append(jnp.sum(jnp.square(upcast(contribution))))

        map_owners(read, visit.params, rule(visit.params, residuals, dy)[0])
        return norms

    return one_by_one(example, (visit.residuals, visit.dy))


square_norms = Collector(_square_norms, batch_axis=-1, degree=2)
"""Per parameter, the square norm (B,) of each example's term of the gradient.

The terms add up to the gradient; under a mean loss each has the weight of its example over the sum
of the weights as a factor. Where every rule leaves its cotangents unsummed this costs little more
than the gradient; a rule that gives plain arrays is run one example at a time, with a warning.

References:
    Goodfellow, "Efficient per-example gradient computations", 2015.
"""

statistics = Collector(
    lambda visit: map_owners(
        lambda _, c: c if isinstance(c, Moments) else None, visit.params, visit.contributions
    ),
    degree=0,
)
"""What running statistics saw of the batch, for `merge_statistics`; None for other parameters."""


def merge_statistics(params: Params, seen: PyTree) -> Params:
    """The parameters with their running statistics brought up to date, the others unchanged.

    Args:
        params: parameters, some of them `Running`.
        seen: what the `statistics` collector gathered, summed over micro-batches.
    """
    return map_owners(lambda p, c: p if c is None else p.merge(c), params, seen)


def per_example_norms(collected: PyTree) -> Array:
    """The norm (B,) of each example's term of the gradient, from what `square_norms` gathered.

    Under a mean loss that is the norm of the example's own gradient times its weight over the sum
    of the weights: multiply by the batch's weight to compare with a norm to clip examples at.

    Args:
        collected: a tree of square norms, each with the batch as its last axis.

    Raises:
        ValueError: for a tree without any.
    """
    if not jax.tree.leaves(collected):
        raise ValueError("per_example_norms needs what square_norms gathered, got an empty tree")
    squares = [jnp.sum(leaf, tuple(range(leaf.ndim - 1))) for leaf in jax.tree.leaves(collected)]
    return jnp.sqrt(functools.reduce(jnp.add, squares))
