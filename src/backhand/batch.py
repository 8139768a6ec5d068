"""A batch: a dict of arrays that have the examples as their first axis."""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import numpy as np

from backhand.protocol import listed, suggestion
from backhand.visit import PyTree

Batch: TypeAlias = Mapping[str, PyTree]


def names_of(of_model: frozenset[str], has_targets: bool) -> frozenset[str]:
    """The names in a batch for a model that takes some, and a loss with targets or without."""
    return of_model | {"inputs", "weights"} | ({"targets"} if has_targets else set())


def check_batch(
    batch: Batch, names: frozenset[str] = frozenset(), has_targets: bool = True
) -> None:
    """Refuses a batch whose structure cannot be right.

    Args:
        batch: a dict with inputs, targets and optionally weights.
        names: what else the model takes from it.
        has_targets: whether the loss has targets.

    Raises:
        TypeError: for a batch that is not a dict, or numbers in a list.
        ValueError: for missing or unknown names, or arrays of different lengths.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a dict with 'inputs' and 'targets', got {type(batch).__name__}"
        )
    known = names_of(names, has_targets)
    needed = {"inputs", "targets"} & known
    for name in sorted(needed - batch.keys()):
        raise ValueError(f"a batch needs {name!r}, got {listed(batch.keys())}")
    for name in sorted(batch.keys() - known):
        raise ValueError(
            f"the batch holds {name!r}, which the model does not use{suggestion(name, known)}; it "
            f"uses {listed(known)}"
        )
    for name, value in batch.items():
        numbers = (isinstance(leaf, bool | int | float) for leaf in jax.tree.leaves(value))
        if isinstance(value, list | tuple) and any(numbers):
            raise TypeError(
                f"batch[{name!r}] must be an array, got a {type(value).__name__} of numbers: make "
                f"it one with np.asarray"
            )
    lengths = {
        jax.tree_util.keystr(path): np.shape(leaf)[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(batch))
    }
    if len(set(lengths.values())) > 1 or () in lengths.values():
        found = ", ".join(f"{path}: {length or 'a scalar'}" for path, length in lengths.items())
        raise ValueError(f"the arrays of a batch need one common first axis, got {found}")
