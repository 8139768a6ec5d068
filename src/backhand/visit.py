"""What a reverse pass visits, and what is gathered there.

A collector is called once for each owner of parameters, from the last to the first. The gradient is
just the default one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from backhand.contributions import both, is_contribution, map_owners, total

PyTree: TypeAlias = Any
Params: TypeAlias = PyTree
Residuals: TypeAlias = PyTree
Collect: TypeAlias = "Callable[[Visit], tuple[PyTree, PyTree]]"
Rule: TypeAlias = Callable[..., tuple[PyTree, PyTree]]


class Visit:
    """One owner of parameters, on the way back: what a collector reads.

    Attributes:
        params: the owner's parameters.
        residuals: what its forward saved.
        dy: the error of its output.
        rule: `(params, residuals, dy) -> (contributions, dx)`; None where the contributions are
            not those of one rule (shared parameters, frozen ones).
        contributions, dparams, dx: what the rule gives, computed when first asked for, and once.
    """

    def __init__(self, params: Params, residuals: Residuals, dy: PyTree, rule: Rule | None):
        self.params = params
        self.residuals = residuals
        self.dy = dy
        self.rule = rule

    def replace(self, params: Params, contributions: PyTree) -> "Visit":
        """The visit with other contributions, each per parameter of `params`."""
        visit = Visit(params, self.residuals, self.dy, None)
        visit._reverse = (contributions, None if self.rule is None else self.dx)
        return visit

    @functools.cached_property
    def _reverse(self) -> tuple[PyTree, PyTree]:
        assert self.rule is not None
        return self.rule(self.params, self.residuals, self.dy)

    @property
    def contributions(self) -> PyTree:
        """Per parameter, what the error adds to its gradient, not yet summed."""
        return self._reverse[0]

    @property
    def dx(self) -> PyTree:
        """The error of the owner's input."""
        return self._reverse[1]

    @functools.cached_property
    def dparams(self) -> PyTree:
        """The gradient, in the dtype and sharding of the parameters."""
        return map_owners(lambda p, c: total(c, p), self.params, self.contributions)

    def frozen(self) -> "Visit":
        """The same visit with no contribution to any parameter, so no work for one."""
        return self.replace(self.params, map_owners(lambda _: None, self.params))


@dataclasses.dataclass(frozen=True)
class Collector:
    """What is gathered at every owner of parameters on the way back.

    Args:
        read: `visit -> anything`.
        batch_axis: the axis of every collected array that is the batch's, counted from the end
            (`repeat` stacks depth in front); None where the arrays add up over micro-batches.
        degree: the power of the error that the arrays follow: 1 if twice the error gives twice
            the arrays, as with gradients; None if not a power.
        onto: sums that gradients are to be added to, by the identity of the parameter; what has
            been added to one comes back as `Summed`. A scan over depth carries them, so that it
            need not stack the gradient first.
        merge: from two trees collected of the same parameters, in two reverse passes, to that of
            both; None where the arrays add up, or where nothing follows from the two.
    """

    read: Callable[[Visit], PyTree]
    batch_axis: int | None = None
    degree: int | None = None
    onto: Mapping[int, Array] = dataclasses.field(default_factory=dict)
    merge: Callable[[PyTree, PyTree], PyTree] | None = None

    def __call__(self, visit: Visit) -> tuple[PyTree, PyTree]:
        """`collect(visit) -> (collected, dx)`, as `Layer.backward` takes it."""
        return self.read(visit), visit.dx


gradients = Collector(lambda visit: visit.dparams, degree=1)
contributions = Collector(
    lambda visit: visit.contributions,
    merge=lambda one, other: jax.tree.map(both, one, other, is_leaf=is_contribution),
)


def together(collectors: Mapping[str, Collect]) -> Collector:
    """Several collectors on one traversal; `apart` separates what they gathered."""
    degrees = {getattr(collector, "degree", None) for collector in collectors.values()}
    return Collector(
        lambda visit: _Row({n: c(visit)[0] for n, c in collectors.items()}),
        degree=1 if degrees <= {0, 1} else None,
        onto=dict(pair for c in collectors.values() for pair in getattr(c, "onto", {}).items()),
        merge=lambda *two: jax.tree.map(
            lambda one, other: _Row(
                {n: merged(c, one.values[n], other.values[n]) for n, c in collectors.items()}
            ),
            *two,
            is_leaf=_is_row,
        ),
    )


def merged(collect: Collect, one: PyTree, other: PyTree) -> PyTree:
    """What was collected of the same parameters in two reverse passes, as if in one.

    Raises:
        ValueError: for what neither adds up nor says how it merges, such as square norms.
    """
    merge = getattr(collect, "merge", None)
    if merge is not None:
        return merge(one, other)
    if getattr(collect, "degree", None) not in (0, 1):
        raise ValueError(
            "what is collected over several objectives must add up over the uses of a "
            "parameter, as gradients and statistics do; collect from each objective instead"
        )
    return jax.tree.map(jnp.add, one, other)


def apart(collected: PyTree, name: str) -> PyTree:
    """What the collector of that name gathered, as if it had been alone."""
    return jax.tree.map(lambda row: row.values[name], collected, is_leaf=_is_row)


@dataclasses.dataclass(frozen=True)
class Summed:
    """A sum that something collected has been added to already.

    No tree of arrays, so that arithmetic on it, as on a gradient, raises.
    """

    total: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Row:
    """What several collectors gathered at one owner, by name."""

    values: dict[str, PyTree]


def _is_row(node: Any) -> bool:
    return isinstance(node, _Row)
