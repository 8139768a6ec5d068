"""A wrong gradient beside the right one, and when a relation between the two explains the error."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from backhand.audit.result import Cause

Arrays = Mapping[str, np.ndarray]

UNEXPLAINED = 0.02
"""The share of the difference that a relation may leave over."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What is known besides the two gradients; the more, the more causes can be told apart.

    Attributes:
        batch: the length of the batch axis, the first of what has one.
        shapes: of the arguments and outputs, by path.
        noise: the relative difference that is rounding, as the verdict's tolerance.
        dtypes: of the cotangent and of its primal, where it is known.
        inputs: the arguments by path, integers and booleans too.
        errors: the cotangents of the outputs by path, (S, *shape).
        vjp: `(inputs, errors) -> cotangents by path` of the reference, to try hypotheses with.
        alternatives: references with another setting, by "eps=0", as `vjp`.
        mistakes: gives causes, each with what the reference gives under the first error if there is
            that mistake in its reverse, and with that reference as `vjp`.
    """

    batch: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    noise: float = 1e-9
    dtypes: tuple[str, str] | None = None
    inputs: Arrays = dataclasses.field(default_factory=dict)
    errors: Arrays = dataclasses.field(default_factory=dict)
    vjp: Callable[[Arrays, Arrays], Arrays] | None = None
    alternatives: Mapping[str, Callable[[Arrays, Arrays], Arrays]] = dataclasses.field(
        default_factory=dict
    )
    mistakes: Callable[[], Sequence[tuple[Cause, Arrays, Callable[[Arrays, Arrays], Arrays]]]] = (
        lambda: ()
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One leaf's two gradients under S random cotangents, and those of the other leaves.

    Attributes:
        ours: (S, *shape), float64.
        truth: the same.
        others: `(ours, truth)` of the other leaves, by path.
        context: what else is known.
        path: the leaf's own, if known.
    """

    ours: np.ndarray
    truth: np.ndarray
    others: Mapping[str, tuple[np.ndarray, np.ndarray]]
    context: Context
    path: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return self.truth.shape[1:]

    @functools.cached_property
    def difference(self) -> np.ndarray:
        """Ours less the truth."""
        return self.ours - self.truth

    @functools.cached_property
    def rounding(self) -> float:
        """The largest difference in an element that may be rounding."""
        return self.context.noise * float(np.abs(self.truth).max(initial=0))

    def explains(self, candidate: np.ndarray) -> bool:
        """Whether ours is this array, but for rounding."""
        return self.vanishes(self.ours - candidate)

    def vanishes(self, rest: np.ndarray, of: np.ndarray | None = None) -> bool:
        """Whether this rest is nothing beside the difference.

        Args:
            rest: what a relation leaves over.
            of: the part of the difference that the relation is about, if not all of it.
        """
        wrong = self._wrong if of is None else _norm(of)
        return wrong > 0 and _norm(rest) <= self._most(wrong, rest.size)

    def hopeless(self, some: np.ndarray) -> bool:
        """Whether some elements of a rest are too much already for all of it to vanish."""
        return _norm(some) > self._most(self._wrong, self.ours.size)

    @functools.cached_property
    def _wrong(self) -> float:
        return _norm(self.difference)

    def _most(self, wrong: float, size: int) -> float:
        """The norm of a rest that is nothing beside a difference of norm `wrong`."""
        return max(UNEXPLAINED * wrong, min(self.rounding * size**0.5, 0.25 * wrong))


def fit(ours: np.ndarray, truth: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """The factor s for which s * truth is nearest to ours, over some axes; 0 for a zero truth.

    Example:
        >>> float(fit(np.array([2.0, 4.0]), np.array([1.0, 2.0])))
        2.0
    """
    size = np.sum(truth * truth, axis=axis, keepdims=True)
    product = np.sum(ours * truth, axis=axis, keepdims=True)
    scale = np.asarray(product / np.where(size > 0, size, 1))
    return scale.reshape(()) if axis is None else scale


def cosine(ours: np.ndarray, truth: np.ndarray) -> float:
    """Of the angle between two arrays; 0 where one of them is zero."""
    sizes = _norm(ours) * _norm(truth)
    return float(np.vdot(ours, truth)) / sizes if sizes else 0.0


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.ravel()))
