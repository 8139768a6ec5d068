"""How a bug is planted in a right backward pass: a function from the right pass to a wrong one.

A pass is `(arguments, residuals, dy) -> cotangents`, as `backhand.catalogue.Row.backward`. The bugs
themselves are in `backhand.audit.selftest.bugs`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from backhand.visit import PyTree, Residuals

Cotangents: TypeAlias = tuple[PyTree, ...]
Backward: TypeAlias = Callable[[tuple[PyTree, ...], Residuals, PyTree], Cotangents]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Where a bug is planted.

    Attributes:
        place: the index of the argument, and of its leaf.
        twin: that of another leaf of the same shape; None if there is none.
        batch: the length of the batch axis; None if there is none.
        seed: of what a bug draws at random.
        other: residuals of another batch; None where there are none.
        defaults: the right pass with its op's default settings; None where it has them.
        dys: the errors of the calls, in order.
        mistaken: the pass with a mistake of a kind of `backhand.audit.paths`; None where it has
            none.
    """

    place: tuple[int, int]
    twin: tuple[int, int] | None = None
    batch: int | None = None
    seed: int = 0
    other: Residuals = None
    defaults: Backward | None = None
    dys: Sequence[PyTree] = ()
    mistaken: Callable[[str], Backward | None] = lambda kind: None


@dataclasses.dataclass(frozen=True, eq=False)
class Bug:
    """One kind of bug.

    Attributes:
        kind: what it is called.
        causes: the kinds of `backhand.audit.diagnosis.KINDS` that name it rightly.
        plant: `(right pass, site) -> wrong pass`; None where it does not apply.
        whole: whether it does not depend on the leaf: it is planted once a row, not once a leaf.
    """

    kind: str
    causes: frozenset[str]
    plant: Callable[[Backward, Site], Backward | None]
    whole: bool = False


def leaves_of(arguments: Sequence[PyTree], cotangents: Sequence[PyTree]) -> list[list[Any]]:
    """The cotangents' leaves as lists, one an argument, None where a leaf has none."""
    found = []
    for argument, cotangent in zip(arguments, cotangents, strict=True):
        structure: Any = jax.tree.structure(argument)
        none = [None] * structure.num_leaves
        found.append(none if cotangent is None else structure.flatten_up_to(cotangent))
    return found


def replaced(
    arguments: tuple[PyTree, ...],
    cotangents: Cotangents,
    changes: dict[tuple[int, int], Callable[[Any], Any]],
) -> Cotangents:
    """The cotangents, some leaves changed.

    Args:
        arguments: of the pass.
        cotangents: what it gives, one an argument.
        changes: by the index of the argument and of its leaf.

    Example:
        >>> replaced((1.0, 2.0), (3.0, 4.0), {(1, 0): lambda leaf: -leaf})
        (3.0, -4.0)
    """
    found = leaves_of(arguments, cotangents)
    for (argument, leaf), change in changes.items():
        found[argument][leaf] = change(found[argument][leaf])
    structures: Any = (jax.tree.structure(argument) for argument in arguments)
    return tuple(
        structure.unflatten(leaves) for structure, leaves in zip(structures, found, strict=True)
    )
