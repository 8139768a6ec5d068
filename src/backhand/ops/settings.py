"""Settings of ops, as they may be given: one number for all axes or one for each, padding by name.

SAME gives ceil(n / stride) places on an axis of n, from as little padding as that takes, the odd
one behind; CAUSAL pads in front alone, so that a window ends at its place.
"""

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

from backhand.arrays import whole_number

Padding: TypeAlias = str | Sequence[tuple[int, int]]
PerAxis: TypeAlias = int | Sequence[int]
Pairs: TypeAlias = tuple[tuple[int, int], ...]


def integer(name: str, what: str, given: Any) -> int:
    """A number of at least 1.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1.
    """
    (found,) = per_axis(name, what, given, 1)
    return found


def per_axis(name: str, what: str, given: PerAxis, rank: int) -> tuple[int, ...]:
    """A number for every spatial axis, from one for all or one for each.

    Raises:
        ValueError: if there are not as many, or one is below 1.
        TypeError: if one is not an integer.
    """
    listed = isinstance(given, Sequence) or getattr(given, "ndim", 0) > 0
    several = listed and not isinstance(given, str)
    values: tuple[Any, ...] = tuple(given) if several else (given,) * rank  # type: ignore[arg-type]
    if len(values) != rank:
        axes = f" or {rank}, one for each spatial axis" if rank > 1 else ", for one spatial axis"
        raise ValueError(f"{name} needs {what} as one integer{axes}, got {given}")
    try:
        found = tuple(whole_number(what, value) for value in values)
    except TypeError:
        raise TypeError(f"{name} needs {what} of integers, got {given!r}") from None
    if min(found) < 1:
        raise ValueError(f"{name} needs {what} of at least 1, got {given}")
    return found


def pairs(name: str, given: Any, rank: int, named: Sequence[str]) -> Pairs:
    """Explicit padding.

    Raises:
        ValueError: if it is not a pair of integers of at least 0 for each spatial axis; the error
            names the paddings that have a name.
    """
    known = ", ".join(repr(each) for each in named)
    try:
        found = tuple((operator.index(lo), operator.index(hi)) for lo, hi in given)
    except (TypeError, ValueError):
        found = ()
    if len(found) != rank or min(min(pair) for pair in found) < 0:
        example = ", ".join(["(1, 1)"] * rank)
        raise ValueError(
            f"{name} needs padding {known}, or for each of the {rank} spatial axes a pair of at "
            f"least 0 in front and behind, as in [{example}]; got {given!r}"
        )
    return found


def pads(
    name: str,
    padding: Padding,
    sizes: Sequence[int],
    stride: Sequence[int],
    reach: Sequence[int],
    named: Sequence[str],
) -> Pairs:
    """Padding as pairs, where windows reach over so many inputs, and these paddings have a name.

    Raises:
        ValueError: for a padding that there is not.
    """
    rank, known = len(reach), padding if isinstance(padding, str) and padding in named else None
    if known == "VALID":
        return ((0, 0),) * rank
    if known == "SAME":
        axes = zip(sizes, stride, reach, strict=True)
        missing = [max((-(-n // s) - 1) * s + window - n, 0) for n, s, window in axes]
        return tuple((zeros // 2, zeros - zeros // 2) for zeros in missing)
    if known == "CAUSAL":
        if rank != 1:
            raise ValueError(f"{name} needs one spatial axis for padding 'CAUSAL', got {rank}")
        return ((reach[0] - 1, 0),)
    return pairs(name, padding, rank, named)
