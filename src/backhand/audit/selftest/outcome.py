"""What an audit says of a pass, right or with a bug in it, and whether there is a bug to see."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from backhand.audit.accuracy import Sides, cause_of, verdicts_on
from backhand.audit.gradient import Rounding, Verdict, errors
from backhand.audit.result import Cause
from backhand.audit.selftest.trial import DTYPES, F32, F64, Results, Trial

EXACT = 1e-12
"""A change in float64 of less than this share of a leaf leaves the gradient as it is."""

SIGHT, AUTODIFF = 64, 16
"""In a lower dtype, so many roundings of the leaf's largest element, or times autodiff's error."""

ZERO = 1e-10
"""The share of the largest leaf below which a leaf is zero in exact arithmetic."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an audit says of a bug.

    Attributes:
        changed: the leaves that it changes; empty where it is no bug.
        named: the leaves that the audit finds wrong.
        cause: of the one of them that is furthest off.
    """

    changed: frozenset[str]
    named: frozenset[str]
    cause: Cause | None

    @property
    def caught(self) -> bool:
        """Whether any leaf is found wrong."""
        return bool(self.named)

    @property
    def leaf_named(self) -> bool:
        """Whether only leaves that the bug changes are found wrong."""
        return self.caught and self.named <= self.changed


def outcome(trial: Trial, dtype: Any, wrong: Results) -> Outcome:
    """What the audit in a dtype says of a pass with a bug."""
    dtype = jnp.dtype(dtype)
    changed = _changed(trial, dtype, wrong)
    if not changed:
        return Outcome(changed, changed, None)
    touched = [
        index
        for index in range(len(trial.paths))
        if any(_differ(wrong[d].leaves[index], trial.right[d].leaves[index]) for d in DTYPES)
    ]
    named = _named(trial, dtype, wrong, touched)
    faults = wrong[dtype].faults
    if faults:
        return Outcome(changed, frozenset(named) | faults, Cause("structure", "see its faults"))
    if not named:
        return Outcome(changed, frozenset(), None)
    worst = max(named, key=lambda path: named[path].relative)
    return Outcome(changed, frozenset(named), _cause(trial, dtype, wrong, worst, named[worst]))


def _cause(
    trial: Trial, dtype: np.dtype, wrong: Results, path: str, verdict: Verdict
) -> Cause | None:
    ours = wrong[judged(trial, dtype)].leaves
    sides = zip(trial.paths, ours, trial.at(F64).automatic, strict=True)
    pairs = {name: (own, truth) for name, own, truth in sides}
    return cause_of(path, pairs, verdict, trial.context)


def correct(trial: Trial, dtype: Any, seed: int) -> bool:
    """Whether the verdict in a dtype finds the right pass right, at the arguments of a seed."""
    given = {d: trial.result(d, trial.at(d, seed).cotangents, seed) for d in DTYPES}
    named = _named(trial, jnp.dtype(dtype), given, range(len(trial.paths)), seed)
    return not named and not given[jnp.dtype(dtype)].faults


def _named(
    trial: Trial, dtype: np.dtype, given: Results, places: Sequence[int], seed: int | None = None
) -> dict[str, Verdict]:
    """The verdicts of `bh.check`, by path, on those of some leaves that are wrong."""
    truth, low = trial.at(F64, seed).automatic, trial.at(F32, seed).automatic
    names, dtype = [trial.paths[i] for i in places], judged(trial, dtype)
    level = F64 if dtype == F64 else max(F32, trial.runs.level, key=_eps)
    sides = Sides(given[dtype].leaves, truth, given[F32].leaves, low, truth)
    some = Sides(*([leaves[i] for i in places] for leaves in sides))

    def nearby() -> list[np.ndarray]:
        every = trial.nearby(trial.seed if seed is None else seed)
        return [every[i] for i in places]

    known = Rounding(trial.runs.length, nearby=nearby)
    found = zip(names, verdicts_on(names, some, level, known), strict=True)
    return {name: verdict for name, verdict in found if not verdict.agrees}


def judged(trial: Trial, dtype: Any) -> np.dtype:
    """The dtype of the runs that an audit looks at: float32 where float64 is not kept to."""
    return jnp.dtype(dtype) if trial.runs.level == F64 else F32


def _changed(trial: Trial, dtype: np.dtype, wrong: Results) -> frozenset[str]:
    """The leaves that a bug changes visibly; see `EXACT`, `SIGHT`, `AUTODIFF`."""
    dtype = judged(trial, dtype)
    truth, low = trial.at(F64).automatic, trial.at(F32).automatic
    largest = max((float(np.abs(leaf).max(initial=0)) for leaf in truth), default=0.0)
    found = set(wrong[dtype].faults)
    for index, path in enumerate(trial.paths):
        a, b = wrong[dtype].leaves[index], trial.right[dtype].leaves[index]
        if a.shape != b.shape:
            found.add(path)
            continue
        size = float(np.abs(truth[index]).max(initial=0))
        size = size if size > ZERO * largest else largest
        limit = EXACT * size
        if dtype == F32:
            own = float(errors(truth[index], low[index]).max(initial=0))
            eps = _eps(max(F32, trial.runs.level, key=_eps))
            limit = max(SIGHT * eps * size, AUTODIFF * own)
        with np.errstate(invalid="ignore"):
            if not (np.abs(a - b) <= limit).all():
                found.add(path)
    return frozenset(found)


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return not np.array_equal(a, b, equal_nan=True)
