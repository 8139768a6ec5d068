"""How is a gradient wrong? Detectors, the most specific first, each for one way to be wrong."""

from collections.abc import Callable, Mapping

import numpy as np

from backhand.audit.diagnosis import relations, support
from backhand.audit.diagnosis.hypotheses import hypotheses, mistakes
from backhand.audit.diagnosis.pair import Context, Pair
from backhand.audit.result import Cause

KINDS: Mapping[str, str] = {
    "shape": "It has not the shape of its primal.",
    "dtype": "It has not the dtype of its primal.",
    "not finite": "NaN or infinite where the truth is finite.",
    "zero": "Zero everywhere: a path is missing.",
    "spurious": "Not zero, where the true gradient is zero everywhere.",
    "sign": "The sign is flipped.",
    "mean": "A factor that is the length of an axis or of several: a mean missing, or too many.",
    "factor": "A factor, the same under every cotangent.",
    "dy ignored": "The same under every cotangent.",
    "swapped": "The gradient of another argument.",
    "stale": "The gradient under the cotangent of another call.",
    "transposed": "The axes are in another order.",
    "reversed": "Back to front along an axis.",
    "rolled": "Off by some places along an axis.",
    "permuted": "The slices along an axis are in another order.",
    "rounded": "Rounded to a coarser dtype, at the end or on the way.",
    "kink": "Differs only where an input is zero, or two are equal.",
    "unmasked": "Differs only where the true gradient is zero.",
    "element": "One element alone differs.",
    "block": "Only some slices along an axis differ: a ragged block, its border, a stride.",
    "broadcast": "Constant along an axis where the truth varies: summed over the wrong axis.",
    "offset": "A constant, or a term without dy, is added.",
    "dropped": "A term of fewer dimensions is missing: constant along an axis, or of low rank.",
    "another error": "The gradient under the dy of another example.",
    "another example": "The gradient with the inputs of another example: stale residuals.",
    "left out": "An example is left out of the sum.",
    "output ignored": "The error of one of the outputs is ignored.",
    "input ignored": "A mask or a factor is not applied.",
    "identity": "dy itself is missing or too much: the way around, as in x + f(x).",
    "setting": "The gradient with another setting than the forward's.",
    "padding": "The gradient with an input off by one along an axis: another padding or step.",
    "sum": "What comes back through a sum, a mean or a largest is left out: taken for a constant.",
    "path": "One of the paths through an argument is missing.",
    "step": "In a loop, a number of another step: the state of the wrong step.",
    "slices": "Each slice along an axis has a factor of its own.",
    "local": "Each element has a factor of its own, whatever the cotangent: another derivative.",
    "nonlinear": "Not a linear function of dy.",
    "nearly": "Almost right: a small term is another.",
    "unknown": "No simple relation.",
}
"""Every kind of cause, in a sentence."""

DETECTORS: tuple[Callable[[Pair], Cause | None], ...] = (
    relations.exchanged,
    relations.zero,
    relations.spurious,
    relations.scale,
    relations.constant_in_dy,
    relations.swapped,
    relations.other_cotangent,
    relations.transposed,
    relations.rolled,
    relations.rounded,
    support.kink,
    support.unmasked,
    support.element,
    support.block,
    hypotheses,
    relations.broadcast,
    relations.offset,
    mistakes,
    relations.dropped,
    relations.local,
    relations.imprecise,
    relations.nonlinear,
)
"""What is tried, in order, on two finite gradients of one shape that differ."""


def diagnose(
    ours: np.ndarray,
    truth: np.ndarray,
    others: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    context: Context | None = None,
    path: str = "",
) -> Cause | None:
    """The likeliest cause of the difference between a gradient and the true one.

    Args:
        ours: the gradient of one leaf under S random cotangents, (S, *shape) in float64.
        truth: the true one, likewise.
        others: `(ours, truth)` of the other leaves by path, for arguments that are swapped.
        context: what else is known; see `Context`.
        path: the leaf's own.

    Returns:
        A cause; None where the two agree but for `context.noise`.

    Example:
        >>> truth = np.arange(12.0).reshape(2, 3, 2)
        >>> print(diagnose(3 * truth, truth, context=Context(batch=3)).message)
        3.0 x too large: a mean over the batch of 3 is missing
    """
    pair = Pair(np.asarray(ours), np.asarray(truth), others or {}, context or Context(), path)
    for first in (relations.shape, support.nonfinite):
        if (cause := first(pair)) is not None:
            return cause
    both = np.isfinite(pair.ours) & np.isfinite(pair.truth)
    if not both.all():  # infinite in the same places
        ours, truth = (np.where(both, side, 0) for side in (pair.ours, pair.truth))
        pair = Pair(ours, truth, pair.others, pair.context, path)
    if np.abs(pair.difference).max(initial=0) <= pair.rounding:
        return None
    for detector in DETECTORS:
        if (cause := detector(pair)) is not None:
            return cause
    return relations.unknown(pair)
