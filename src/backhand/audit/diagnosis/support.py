"""Causes that show in where a wrong gradient differs: elements, rows, blocks, kinks, masks.

Each detector takes a `Pair` and gives a `Cause`, or None where it does not apply.
"""

from collections.abc import Iterator

import numpy as np

from backhand.audit.diagnosis.pair import Pair
from backhand.audit.result import Cause

VISIBLE = 8
"""How many times its rounding an element's difference must be to count as wrong."""


def nonfinite(pair: Pair) -> Cause | None:
    """NaN or infinity where the truth is finite, or the other way round."""
    if pair.ours.shape != pair.truth.shape:
        return None
    sick = (~np.isfinite(pair.ours) & np.isfinite(pair.truth)).any(0)
    if not sick.any():
        healthy = (np.isfinite(pair.ours) & ~np.isfinite(pair.truth)).any(0)
        if healthy.any():
            return Cause("not finite", f"finite where the truth is not: {_places(healthy)}")
        return None
    what = "NaN" if np.isnan(pair.ours).any() else "infinite"
    return Cause("not finite", f"{what} {_places(sick)}")


def element(pair: Pair) -> Cause | None:
    """One element alone."""
    wrong = _wrong(pair)
    if wrong.size < 2 or wrong.sum() != 1:
        return None
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    off, true = (side[:, wrong][:, 0] for side in (pair.difference, pair.truth))
    worst = int(np.abs(off).argmax())
    return Cause(
        "element",
        f"only the element at {_index(place)} differs, by {off[worst]:.3g} of {true[worst]:.3g}",
    )


def kink(pair: Pair) -> Cause | None:
    """Just where an input of the leaf's shape is zero, or two of them are equal.

    Wrong everywhere is no kink: a fresh layer's bias is zero in every element.
    """
    wrong = _wrong(pair)
    if not wrong.any() or wrong.all() or np.array_equal(wrong, _silent(pair)):
        return None
    alike = {path: x for path, x in pair.context.inputs.items() if x.shape == pair.shape}
    for path, x in alike.items():
        if np.issubdtype(x.dtype, np.floating) and np.array_equal(wrong, x == 0):
            return Cause("kink", f"differs only where `{path}` is 0: a kink")
        for other, z in alike.items():
            if path < other and np.array_equal(wrong, x == z):
                return Cause("kink", f"differs only where `{path}` equals `{other}`: a tie")
    return None


def unmasked(pair: Pair) -> Cause | None:
    """Only where the true gradient is zero under every cotangent."""
    wrong, silent = _wrong(pair), _silent(pair)
    if not wrong.any() or not silent[wrong].all() or silent.all():
        return None
    return Cause(
        "unmasked",
        f"right but where the true gradient is 0 ({_places(wrong)}): a mask is not applied",
    )


def block(pair: Pair) -> Cause | None:
    """Only some slices along an axis: the last, from k on, every n-th, a block."""
    wrong = _wrong(pair)
    telling = wrong | (np.abs(pair.truth).max(0) > pair.rounding)
    parts, strided, region = [], False, []
    for axis, length in enumerate(wrong.shape):
        others = tuple(other for other in range(wrong.ndim) if other != axis)
        bad, known = np.flatnonzero(wrong.any(others)), np.flatnonzero(telling.any(others))
        region.append(bad)
        if 0 < len(bad) < len(known):
            text, regular = _slices(bad, known, axis, length)
            if text is None:
                return None
            parts.append(text)
            strided = strided or regular
    # Scattered elements leave some slices out by chance: a block is wrong in most of its elements.
    if not parts or wrong.sum() < 0.5 * telling[np.ix_(*region)].sum():
        return None
    zero = not pair.ours[:, wrong].any()
    if zero and (pair.truth[:, wrong] != 0).any():
        why = "they are zero: never written, a ragged block"
    else:
        why = "a stride" if strided else "the border of a block"
    return Cause("block", f"only {' and '.join(parts)}: {why}")


def _wrong(pair: Pair) -> np.ndarray:
    """Which elements of the leaf differ visibly under any cotangent."""
    off, size = np.abs(pair.difference).max(0), np.sqrt(np.mean(pair.truth**2, 0))
    return np.asarray(off > VISIBLE * pair.context.noise * size + pair.rounding / 2)


def _silent(pair: Pair) -> np.ndarray:
    """Where the true gradient is zero under every cotangent."""
    return np.asarray((pair.truth == 0).all(0))


def _slices(bad: np.ndarray, known: np.ndarray, axis: int, length: int) -> tuple[str | None, bool]:
    """Slices along an axis in words, and whether they are every n-th; None for no pattern."""
    first, last = int(bad[0]), int(bad[-1])
    name = f"of axis {axis}"
    if len(bad) == 1:
        ends = {0: "the first slice", length - 1: "the last slice"}
        return f"{ends.get(first, f'slice {first}')} {name}", False
    if len(bad) == np.sum((known >= first) & (known <= last)):
        if last == known[-1]:
            return f"slices from {first} on {name}", False
        return f"slices {first} to {last} {name}", False
    steps = np.diff(bad)
    if len(bad) > 2 and (steps == steps[0]).all():
        return f"every {_ordinal(int(steps[0]))} slice from {first} {name}", True
    if 2 * len(bad) > len(known):
        return None, False
    listed = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return f"slices {listed} {name}", False


def _places(wrong: np.ndarray) -> str:
    """Where, in words: the first few places."""
    count, size = int(wrong.sum()), wrong.size
    if count == size:
        return "everywhere"
    return f"in {count} of {size} elements, at " + ", ".join(_first(wrong))


def _first(wrong: np.ndarray) -> Iterator[str]:
    for place in np.argwhere(wrong)[:3]:
        yield _index(tuple(int(i) for i in place))


def _index(place: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, place)) + "]"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
