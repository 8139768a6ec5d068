"""Where to look next, from how an attempt is wrong: a question, never the formula."""

import math
from collections.abc import Mapping

from backhand.audit.result import Cause

ADVICE: Mapping[str, str] = {
    "not finite": "which division or logarithm meets a zero? The forward may show how to avoid it.",
    "zero": "change this argument a little: does the output move? By which line of the forward?",
    "spurious": "change this argument a little: the output does not move. What is it that you add?",
    "sign": "when this argument rises, does the output rise or fall? Look for a minus in the "
    "forward, or for one that it has not.",
    "mean": "the forward sums or averages somewhere. What does it divide by, and over which axis?",
    "factor": "a constant is lost or doubled: a power, a root, a division of the forward.",
    "dy ignored": "what comes in is multiplied by the derivative. Where do you use dy?",
    "swapped": "cotangents are returned in the order of the forward's arguments.",
    "stale": "where does this value come from? Use only the residuals and the dy of this call.",
    "transposed": "write the indices of each factor down: which letters are summed, which stay?",
    "reversed": "in which order does the forward go through this axis, and in which do you?",
    "rolled": "count the positions: which element of the output belongs to which of the input?",
    "permuted": "which element of the output belongs to which of the input?",
    "rounded": "a cast to a narrower dtype, or a constant that has one.",
    "kink": "what does the forward do exactly at the border of its two cases?",
    "unmasked": "where the output cannot move there is no blame. Which elements are those?",
    "element": "one element is special: the first, the last, or one that is written twice.",
    "block": "which rows are they? Look for a slice that ends too early, or a row that is "
    "overwritten where it should be added to.",
    "broadcast": "look at each sum and its axis: which one did the forward repeat or sum along?",
    "offset": "every term of a cotangent is a product with dy. Which of yours is not?",
    "dropped": "this argument reaches the output by more than one path. Count them in the forward, "
    "and add up what comes back by each.",
    "another error": "each example gets its own dy.",
    "another example": "each example gets its own residuals.",
    "left out": "are all examples in the sum, the first and the last too?",
    "slices": "a factor is missing that differs from row to row or from column to column: which "
    "argument or residual has that shape?",
    "local": "the shape of the derivative is not right yet. Take the derivative of one element on "
    "paper, and put a number in.",
    "nonlinear": "dy enters once in each product. Do you use it twice, or not at all?",
    "nearly": "nearly right: is there a small constant in the forward that you left out?",
}
"""By kind of cause; see `backhand.audit.diagnosis.KINDS`."""

OTHERWISE = (
    "write one element of the output as a formula of the inputs, take its derivative, and compare "
    "it with your code line by line; hint() helps with the formula."
)


def advice(cause: Cause, *, elementwise: bool = True) -> str:
    """Where to look next.

    Args:
        cause: how the attempt is wrong.
        elementwise: whether each element of the argument acts on its own element of y alone. If
            not, a cotangent that says so has only the direct path.
    """
    kind = "dropped" if cause.kind == "local" and not elementwise else cause.kind
    return ADVICE.get(kind, OTHERWISE)


def of_shape(name: str, got: tuple[int, ...], needed: tuple[int, ...]) -> str:
    """Where to look next for a cotangent of another shape than its argument."""
    if sorted(got) == sorted(needed):
        return "the axes are there, in another order."
    if math.prod(got) > math.prod(needed):
        return f"{name} was used more than once: what came of all its uses is added up."
    return "one number stands for several: each element of the argument needs its own."
