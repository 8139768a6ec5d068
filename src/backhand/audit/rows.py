"""A row of a report: how one leaf of two gradients compares, in numbers."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from backhand.audit.diagnosis import diagnose
from backhand.audit.diagnosis.pair import Context
from backhand.audit.report import Row


def row_of(path: str, ours: Any, other: Any, tolerance: float, floor: float = 0.0) -> Row:
    """One leaf's comparison; a difference of at most `floor` is rounding, whatever its relation.

    Rounding differs from element to element and averages out: the norms must agree more closely.
    """
    a, b = (np.asarray(leaf, np.float64) for leaf in (ours, other))
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    sick = ~(np.isfinite(a) & np.isfinite(b))
    largest = float(np.abs(b).max(initial=0))
    worst = float(np.where(sick, np.inf, difference).max(initial=0))
    at = int(np.argmax(np.where(sick, np.inf, difference))) if a.size else 0
    place = [int(i) for i in np.unravel_index(at, a.shape)] if a.size else []
    relative = worst / largest if largest > 0 else (0.0 if worst == 0 else np.inf)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    with np.errstate(invalid="ignore"):  # of infinite gradients
        both = norms[0] * norms[1]
        cosine = float(np.vdot(a, b) / both) if both else float(norms[0] == norms[1])
        ratio = float(norms[0] / norms[1]) if norms[1] else float(norms[0] == 0 or np.inf)
    average = tolerance / min(4.0, max(1.0, a.size**0.5))
    close = relative <= tolerance and (abs(ratio - 1) <= average or worst == 0)
    return Row(
        path=path,
        shape=tuple(np.shape(other)),
        dtype=str(other.dtype),
        difference=worst,
        relative=float(relative),
        where=tuple(place),
        cosine=cosine,
        norm_ratio=ratio,
        agrees=not sick.any() and (close or worst <= floor),
        note="NaN or Inf in the gradient" if sick.any() else "",
        gradients=(a, b),
    )


def explained(rows: Iterable[Row], known: Callable[[], Context]) -> list[Row]:
    """The rows, with the likely cause where the gradients differ.

    Args:
        rows: each with its gradients, of the shape of the leaf or under S cotangents (S, *shape).
        known: gives what is known besides them; not called where all rows agree.
    """
    rows = list(rows)
    if all(row.agrees for row in rows):
        return rows
    pairs = {row.path: row.stacked for row in rows if row.stacked is not None}
    context, found = known(), []
    for row in rows:
        if not row.agrees and row.path in pairs:
            others = {path: pair for path, pair in pairs.items() if path != row.path}
            noise = dataclasses.replace(context, noise=min(row.relative / 4, 1e-5))
            cause = diagnose(*pairs[row.path], others, noise, row.path)
            row = dataclasses.replace(row, cause=cause)
        found.append(row)
    return found
