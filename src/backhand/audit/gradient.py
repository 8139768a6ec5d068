"""The one verdict on a leaf: is this gradient the true one, but for rounding?

Each element is held against the magnitude M of the terms that are summed in it:

    |ours - truth|  <=  tolerance(dtype, length) M

Under random cotangents dy ~ N(0, 1) the mean square of a gradient over the cotangents is the sum of
the squares of its terms, so M comes from the truth itself. It fails where the terms cancel for
every cotangent (a bias before a normalization: the true gradient is zero). There the other leaves
say how large they may be, and autodiff in a coarser dtype shows them: **rounding shrinks with the
dtype's eps, a mistake does not.** One run may be exact by luck, so where a leaf is off, runs at
points next to this one are asked too.

Beside autodiff in the same dtype a leaf is held as a whole: an element far smaller than the others,
such as a saturated sigmoid's, may be off by the roundings of the others, or as autodiff is there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

ROUNDINGS = 16
"""How many roundings to the result's dtype a right gradient may have."""

FURTHER, FEW = 4, 48
"""How many times autodiff's error that of a leaf may be, in root mean square, beside two roundings;
below float32, where 16 roundings are a tenth of a number, and from so many elements on. In the
catalogue no leaf has more than 1.5 times."""

SLACK = 8
"""How much less accurate than autodiff a right gradient may be, where autodiff is bad too."""


ZERO = 1e-9
"""A leaf this much smaller than the largest is zero but for rounding: its terms are as large."""


class Verdict(NamedTuple):
    """Of one leaf.

    Attributes:
        agrees: whether every element is within the tolerance, and their common factor too.
        relative: the largest difference, over the magnitude M of the element's terms; where the
            leaf is wrong, over the root mean square of the true element alone.
        where: the index of that element in the leaf; empty for a leaf without elements.
        tolerance: the relative difference up to which a leaf agrees.
        difference: the largest absolute difference.
    """

    agrees: bool
    relative: float
    where: tuple[int, ...]
    tolerance: float
    difference: float


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What is known of rounding in a problem.

    Attributes:
        length: the most terms that any sum in it has.
        coarse: for a verdict in float64, per leaf the errors |run - truth| (S, *shape) of float32
            runs, see `errors`; None where there was no such run.
        nearby: gives per leaf the largest errors (*shape) of autodiff in float32 at points next to
            this one; asked only where a leaf is off.
    """

    length: int = 1
    coarse: Sequence[np.ndarray | None] | None = None
    nearby: Callable[[], Sequence[np.ndarray]] | None = None


def judge(
    paths: Sequence[str],
    ours: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    autodiff: Sequence[np.ndarray] | None = None,
    dtype: DTypeLike = jnp.float64,
    context: Rounding | None = None,
) -> tuple[Verdict, ...]:
    """The verdict on each leaf.

    Args:
        paths: of the leaves.
        ours: per leaf, the gradient under S random cotangents (S, *shape).
        truth: per leaf, the true one, computed in float64 from the same numbers.
        autodiff: per leaf, what autodiff gives in `dtype`: where it is bad, ours may be. In float64
            autodiff is the truth, and is left out.
        dtype: that ours was computed in.
        context: what is known of rounding.

    Example:
        >>> truth = np.array([[1.0, 2.0], [0.5, -3.0], [4.0, 1.0]])
        >>> wrong = truth * np.array([1.0, 1 + 1e-9])
        >>> judge(["b"], [wrong], [truth])[0].where
        (1,)
    """
    context = context or Rounding()
    coarse = context.coarse
    if autodiff is not None:
        coarse = [errors(t, a) for a, t in zip(autodiff, truth, strict=True)]
    coarse = coarse or [None] * len(paths)
    finite = [np.nan_to_num(np.asarray(t, np.float64), posinf=0, neginf=0) for t in truth]
    largest = max((float(_rms(leaf)) for leaf in finite), default=0.0)

    def verdicts(coarse: Sequence[np.ndarray | None]) -> tuple[Verdict, ...]:
        return tuple(
            _judge(
                np.asarray(a, np.float64),
                np.asarray(t, np.float64),
                noise,
                dtype,
                autodiff is not None,
                tolerance(dtype, context.length),
                largest if _rms(own) <= ZERO * largest else 0.0,
            )
            for _, a, t, own, noise in zip(paths, ours, truth, finite, coarse, strict=True)
        )

    found = verdicts(coarse)
    if context.nearby is None or all(verdict.agrees for verdict in found):
        return found
    # The noise is in float32's roundings for a verdict in float64, else in those of the dtype.
    rounding = 1.0 if autodiff is None else _eps(dtype) / _eps(jnp.float32)
    more = [leaf * rounding for leaf in context.nearby()]
    return verdicts(
        [b if a is None else np.maximum(a, b) for a, b in zip(coarse, more, strict=True)]
    )


def tolerance(dtype: DTypeLike, length: int = 1) -> float:
    """The relative error that a right sum of `length` terms may have.

    Its terms are rounded to the dtype a few times, and added up in at least float32, where
    roundings of random sign grow with the root of the length. In float64 the truth is rounded as
    much as ours, and accuracy is not the question: sixteen times that is still far below any
    mistake.
    """
    own = _eps(dtype)
    summed = min(own, _eps(jnp.float32))
    share = ROUNDINGS * own + max(length, 1) ** 0.5 * summed
    return float(16 * share if jnp.dtype(dtype) == jnp.float64 else share)


def errors(truth: np.ndarray, *runs: np.ndarray | None) -> np.ndarray:
    """Per element the largest |run - truth|; infinite where a run alone is not finite.

    A run of another shape, which is no gradient of this leaf, shows nothing.
    """
    found = np.zeros(np.shape(truth))
    for run in runs:
        if run is not None and np.shape(run) == found.shape:
            found = np.maximum(found, _difference(np.asarray(run, np.float64), truth))
    return np.asarray(found)


def spared(ours: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ours, NaN where the truth alone is: to avoid autodiff's NaN, as at a norm of 0, is right.

    Example:
        >>> spared([np.array([0.0, 1.0])], [np.array([np.nan, 1.0])])
        [array([nan,  1.])]
    """
    return [
        np.where(np.isnan(b) & np.isfinite(a), np.nan, a) if np.shape(a) == np.shape(b) else a
        for a, b in zip(ours, truth, strict=True)
    ]


def relative_errors(runs: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> list[float]:
    """Per leaf the root mean square error over the truth's root mean square.

    Of a true gradient that is zero but for rounding, over that of the largest leaf. Elements that
    are the same NaN or infinity in both are left out; NaN where nothing else is in a leaf, and
    infinite where an element is not finite in one of the two alone.

    Example:
        >>> truth = np.array([[1.0, np.nan, 1.0]])
        >>> relative_errors([np.array([[1.5, np.nan, 0.5]])], [truth])
        [0.5]
        >>> relative_errors([np.array([[np.nan, np.nan, 1.0]])], [truth])
        [inf]
    """
    sizes = [float(_rms(leaf[np.isfinite(leaf)])) for leaf in truth]
    largest = max(sizes, default=0.0)
    found = []
    for run, leaf, size in zip(runs, truth, sizes, strict=True):
        if np.shape(run) != np.shape(leaf):
            found.append(float("inf"))
            continue
        difference = _difference(np.asarray(run, np.float64), leaf)
        counted = np.isfinite(leaf) | (difference > 0)
        if leaf.size and not counted.any():
            found.append(float("nan"))
            continue
        wrong = float(_rms(difference[counted]))
        scale = size if size > ZERO * largest else largest
        found.append(wrong / scale if scale else (0.0 if wrong == 0 else float("inf")))
    return found


def _judge(
    ours: np.ndarray,
    truth: np.ndarray,
    noise: np.ndarray | None,
    dtype: DTypeLike,
    beside: bool,
    limit: float,
    floor: float,
) -> Verdict:
    """The verdict on one leaf; `beside` is whether the noise is autodiff's in the same dtype."""
    if ours.shape != truth.shape:
        return Verdict(False, float("inf"), (), limit, float("inf"))
    if not ours.size:
        return Verdict(True, 0.0, (), limit, 0.0)
    difference = _difference(ours, truth)
    smallest = float(jnp.finfo(dtype).tiny)
    known = np.where(np.isfinite(truth), truth, 0)
    scale = np.asarray(_scale(known) + smallest + floor)
    if jnp.dtype(dtype) == jnp.float64:  # a few roundings of the largest show nowhere
        scale = np.asarray(scale + 8 * _eps(dtype) / limit * np.abs(known).max())
    magnitude = scale
    if noise is not None:
        shown = _shown_by(noise, truth, scale, dtype, dtype if beside else jnp.float32, limit)
        magnitude = np.asarray(scale + shown)
    worse = False
    if noise is not None and beside:
        off = _rms(np.where(np.isfinite(noise), noise, 0))
        worse = _eps(dtype) > _eps(jnp.float32) and _further(difference, noise, known, dtype)
        magnitude = np.asarray(magnitude + _rms(known) + SLACK * off / limit)
    share = _share(difference, magnitude)
    worst = np.unravel_index(int(np.argmax(share)), share.shape)
    agrees = bool(share.max() <= limit and _factor(ours, truth, magnitude) <= limit / 4)
    agrees = agrees and not worse
    return Verdict(
        agrees=agrees,
        relative=float(share.max() if agrees else _share(difference, scale)[worst]),
        where=tuple(int(i) for i in worst[1:]),
        tolerance=limit,
        difference=float(difference.max()),
    )


def _further(
    difference: np.ndarray, noise: np.ndarray, truth: np.ndarray, dtype: DTypeLike
) -> bool:
    """Whether a whole leaf is further from the truth than autodiff's in the same dtype.

    An element may be off by many roundings where autodiff's is not; a leaf of many may not.
    """
    counted = np.isfinite(difference) & np.isfinite(noise)
    if counted.sum() < FEW:
        return False
    off, autodiff, size = (float(_rms(leaf[counted])) for leaf in (difference, noise, truth))
    return off > FURTHER * autodiff + 2 * _eps(dtype) * size


def _share(difference: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """The difference over the magnitude; 0 where both are infinite, as where autodiff is too."""
    with np.errstate(invalid="ignore", over="ignore"):
        share = np.where(difference == 0, 0, difference / magnitude)
    share = np.where(share > 1e200, np.inf, share)  # of a true gradient of zero
    return np.nan_to_num(share, nan=0.0, posinf=np.inf)


def _shown_by(
    noise: np.ndarray,
    truth: np.ndarray,
    scale: np.ndarray,
    dtype: DTypeLike,
    noise_dtype: DTypeLike,
    limit: float,
) -> np.ndarray:
    """The magnitude that a run's errors show: that at which they are within the tolerance.

    An element's own few errors may be small by luck, so those of the whole leaf, relative to what
    is summed, count for each of its elements.
    """
    same = jnp.dtype(dtype) == jnp.dtype(noise_dtype)
    own = np.asarray(_rms(np.where(np.isfinite(noise), noise, 0), axis=0))
    common = np.zeros_like(own)
    visible = scale > float(jnp.finfo(dtype).tiny)
    if visible.any():
        common = np.quantile(own[visible] / scale[visible], 0.9) * scale
    hidden = _rms(truth, axis=0) < own  # true gradients that are zero but for rounding
    if hidden.any():
        common = common + np.where(hidden, _rms(own[hidden]), 0)
    shown = SLACK * (own + common) * (_eps(dtype) / _eps(noise_dtype)) / limit
    unknown = ~np.isfinite(noise).all(axis=0)
    return np.asarray(np.where(unknown, np.inf, shown) if same else shown)


def _scale(truth: np.ndarray) -> np.ndarray:
    """Per element, the root of the sum of the squares of its terms, from S random cotangents.

    With few cotangents an element may be small by luck. Its row's and column's mean squares then
    say how large it can be; of a single gradient, the whole leaf's too.
    """
    square = np.asarray(np.mean(np.square(truth), axis=0))
    separable = np.ones_like(square)
    for axis in range(square.ndim):
        others = tuple(other for other in range(square.ndim) if other != axis)
        separable = separable * np.mean(square, axis=others, keepdims=True)
    total = np.mean(square)
    separable = separable / total ** (square.ndim - 1) if total else separable * 0
    luck = 0.03 if len(truth) > 2 else 0.3
    alone = 0.3 * np.sqrt(total) if len(truth) == 1 else 0.0
    return np.asarray(np.sqrt(square) + luck * np.sqrt(separable) + alone)


def _factor(ours: np.ndarray, truth: np.ndarray, magnitude: np.ndarray) -> float:
    """How far the best-fit factor of the two is from 1: rounding averages out, a factor not."""
    finite = np.isfinite(ours) & np.isfinite(truth) & np.isfinite(magnitude)
    weight = np.where(finite, 1 / magnitude, 0)
    a, b = np.where(finite, ours, 0) * weight, np.where(finite, truth, 0) * weight
    size = float(np.mean(b * b))
    if size < 1e-2 or b.size < 16:
        return 0.0
    return abs(float(np.mean((a - b) * b)) / size)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|; 0 where both are the same infinity or both NaN, infinite where one alone is."""
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        return np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf))


def _rms(x: np.ndarray, axis: int | None = None) -> Any:
    return np.sqrt(np.mean(np.square(x), axis=axis)) if x.size else np.zeros(())


def _eps(dtype: DTypeLike) -> float:
    return float(jnp.finfo(dtype).eps)
