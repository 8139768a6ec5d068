"""Sums that are carried from one micro-batch to the next, and lose nothing on the way.

Each addition rounds, and where the terms have one sign it may round the same way a thousand times:
a float32 sum of 1,024 weights between 0.001 and 50 was off by 5e-6, and so was every gradient that
was divided by it. What rounding adds to a small sum of many terms is carried beside it and taken
from the next term, so that the sum is as good as if all terms had been there at once:

    y = x - lost        t = total + y        lost = (t - total) - y

References:
    Kahan, "Further remarks on reducing truncation errors", 1965.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from backhand.arrays import at_least, zeros_like
from backhand.blocks import TOGETHER, block_size, plus
from backhand.contributions import total as gradient
from backhand.visit import PyTree, Summed
from backhand.waiting import Unsummed

FEW = 32
"""So many terms are summed plainly: of one sign, they are off by 32 / 2 roundings or 9.5e-7."""

SMALL = 1 << 12
"""A sum of at most so many elements is carried with what it lost, in twice the memory.

Of a loss and its weight, of biases, of all of a small model. 64-64-10 in 1,024 micro-batches of 32
takes 1.2 times as long so, on 2 cores, and its weights are off by 1.3e-7 rather than by 1.5e-6. A
larger sum would need more memory than accumulation may. In 1,024 micro-batches it is off by 1e-6,
where all terms are alike by 1e-5; `dtype=jnp.float64` makes it exact.
"""


class Carried(NamedTuple):
    """A sum so far.

    Attributes:
        total: the sum.
        lost: what rounding added to it that no term had; None where that is not kept.
    """

    total: Array
    lost: Array | None


def begun(like: Array | jax.ShapeDtypeStruct, dtype: DTypeLike, terms: int) -> Carried:
    """An empty sum of so many terms such as `like`, in `dtype` at least."""
    zeros = zeros_like(like, at_least(like.dtype, dtype))
    exact = zeros.size <= SMALL and terms > FEW
    return Carried(zeros, zeros_like(zeros, zeros.dtype) if exact else None)


def addable(sums: Iterable[Carried]) -> list[Array | None]:
    """The sums that anyone may add to; None for one that is carried with what it lost."""
    return [carried.total if carried.lost is None else None for carried in sums]


def plus_each(sums: list[Carried], new: PyTree) -> list[Carried]:
    """Sums with one more term each, in the order of the leaves of `new`."""
    leaves = jax.tree.leaves(new, is_leaf=lambda node: isinstance(node, Summed | Unsummed))
    block = block_size((carried.total for carried in sums), TOGETHER)
    return [_plus(carried, x, block) for carried, x in zip(sums, leaves, strict=True)]


def _plus(carried: Carried, x: Array | Summed | Unsummed, block: int) -> Carried:
    """A sum with one more term."""
    total, lost = carried
    match x:
        case Summed():
            return Carried(x.total, lost)
        case Unsummed() if lost is None:
            return Carried(plus(total, x.contribution, total, block), None)
        case Unsummed():
            return _rounded(total, lost, gradient(x.contribution, total))
        case _:
            return _rounded(total, lost, x)


def _rounded(total: Array, lost: Array | None, x: Array) -> Carried:
    """A sum with one more term, and what rounding takes from it.

    Raises:
        ValueError: for a term of another shape.
    """
    if x.shape != total.shape:
        raise ValueError(
            "what adds up over micro-batches has one shape in all of them, got "
            f"{total.shape} and {x.shape}"
        )
    x = x.astype(total.dtype)
    if lost is None:
        return Carried(total + x, None)
    y = x - lost
    t = total + y
    return Carried(t, jnp.where(jnp.isfinite(t), (t - total) - y, 0))  # infinity stays infinity
