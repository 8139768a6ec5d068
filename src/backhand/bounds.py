"""Integers that must lie in a range: ids and lengths, which a device reads past without a word.

Known ones are refused at once. While a model is traced they are not known: then what is asked of an
array of the batch is noted, and asked again of every batch that comes from the host.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What integers must be.

    Attributes:
        subject: what needs which, "embedding needs ids".
        low: the smallest that will do.
        high: the largest.
        reason: where the bounds are from.
    """

    subject: str
    low: int
    high: int
    reason: str

    def check(self, x: np.ndarray) -> None:
        """Refuses what is outside.

        Raises:
            ValueError: saying what is, and where.
        """
        if x.size == 0:
            return
        if int(x.min()) < self.low:
            worst = int(x.argmin())
        elif int(x.max()) > self.high:
            worst = int(x.argmax())
        else:
            return
        place = [int(i) for i in np.unravel_index(worst, x.shape)]
        raise ValueError(
            f"{self.subject} from {self.low} to {self.high}, {self.reason}; got "
            f"{x.reshape(-1)[worst]} at {place}"
        )


_noted: contextvars.ContextVar[Mapping[int, list[Bounds]] | None]
_noted = contextvars.ContextVar("noted", default=None)


def need_within(subject: str, x: Array | np.ndarray, low: int, high: int, reason: str) -> None:
    """Refuses integers outside of [low, high] where they are known; else notes the bounds.

    Raises:
        ValueError: saying what is outside, and where.
    """
    bounds = Bounds(subject, low, high, reason)
    if isinstance(x, jax.core.Tracer):
        asked = _noted.get() or {}
        asked.get(id(x), []).append(bounds)
    elif getattr(x, "is_fully_addressable", True):
        bounds.check(np.asarray(x))  # even while something else is traced


@contextlib.contextmanager
def noted(tree: Any) -> Iterator[list[list[Bounds]]]:
    """What is asked, while this lasts, of each leaf of a tree of traced arrays.

    Of the leaf itself: what is computed from it is not known on the host.
    """
    leaves = jax.tree.leaves(tree)
    asked: list[list[Bounds]] = [[] for _ in leaves]
    before = _noted.set({id(leaf): own for leaf, own in zip(leaves, asked, strict=True)})
    try:
        yield asked
    finally:
        _noted.reset(before)
