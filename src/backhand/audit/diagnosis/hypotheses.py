"""Causes that show when the right pass is run on wrong inputs: is the bug the same mistake?

Each hypothesis changes the inputs or the incoming errors as a bug would, and asks the reference for
the gradient there. If that is ours, the bug is found.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from backhand.audit.diagnosis.pair import Arrays, Pair
from backhand.audit.result import Cause


def hypotheses(pair: Pair) -> Cause | None:
    """The first change of inputs or errors that turns the truth into ours."""
    context = pair.context
    if context.vjp is None:
        return None
    for first in (_identity, _other_axes):
        if (cause := first(pair)) is not None:
            return cause
    if (cause := _off_by_one(pair)) is not None:
        return cause
    for cause, inputs, errors in _changes(pair):
        if pair.explains(context.vjp(inputs, errors)[pair.path]):
            return cause
    for name, vjp in context.alternatives.items():
        if pair.explains(vjp(context.inputs, context.errors)[pair.path]):
            return Cause("setting", f"the gradient with `{name}`: the setting is not used")
    return None


def mistakes(pair: Pair) -> Cause | None:
    """The mistake in the reverse of one of the reference's equations that gives ours.

    All that lie on one path give the same: a sum is what is most easily forgotten, and the path by
    way of another argument says more than that of an operation.
    """
    wrong = float(np.linalg.norm(pair.difference[0]))
    found: list[Cause] = []
    for cause, first, vjp in pair.context.mistakes():
        near = np.linalg.norm(pair.ours[0] - first[pair.path][0]) <= 0.1 * wrong
        if near and pair.explains(vjp(pair.context.inputs, pair.context.errors)[pair.path]):
            found.append(cause)
    names = [f"`{path}`" for path in pair.context.inputs]

    def rank(cause: Cause) -> int:
        named = any(name in cause.message for name in names)
        return 0 if cause.kind == "sum" else 1 if named else 2

    return min(found, key=rank, default=None)


def _identity(pair: Pair) -> Cause | None:
    """Whether dy itself, as it comes past the leaf, is missing or too much."""
    for path, error in pair.context.errors.items():
        for sign, what in ((-1, "missing"), (1, "added, and should not be")):
            if error.shape == pair.ours.shape and pair.vanishes(pair.difference - sign * error):
                return Cause(
                    "identity", f"dy of `{path}` is {what}: the way around, as in x + f(x)"
                )
    return None


def _other_axes(pair: Pair) -> Cause | None:
    """Whether dy, or dy times an input, is summed over other axes than it should be."""
    arrays = {path: x for path, x in pair.context.inputs.items() if x.dtype.kind == "f"}
    for path, error in pair.context.errors.items():
        sums = {f"dy of `{path}`": error} | {
            f"dy of `{path}` times `{name}`": error * x
            for name, x in arrays.items()
            if x.shape == error.shape[1:]
        }
        for what, each in sums.items():
            found = {
                axes: each.sum(tuple(axis + 1 for axis in axes))
                for axes in _subsets(each.ndim - 1)
                if tuple(np.delete(each.shape[1:], axes)) == pair.shape
            }
            right = [axes for axes, total in found.items() if np.allclose(total, pair.truth)]
            wrong = [axes for axes, total in found.items() if pair.explains(total)]
            if right and wrong:
                over, needed = (", ".join(map(str, axes[0])) for axes in (wrong, right))
                return Cause(
                    "broadcast", f"{what} is summed over axis {over}, and should be over {needed}"
                )
    return None


def _off_by_one(pair: Pair) -> Cause | None:
    """Whether an input is off by one along an axis between its first and last, as by a padding."""
    vjp, inputs, errors = pair.context.vjp, pair.context.inputs, pair.context.errors
    if vjp is None:
        return None
    for path, x in inputs.items():
        for axis in range(1, x.ndim - 1) if x.dtype.kind == "f" else ():
            for by in (1, -1):
                found = vjp({**inputs, path: _shift(x, by, axis)}, errors)[pair.path]
                if path == pair.path:
                    found = _shift(found, -by, axis + 1)
                if pair.explains(found):
                    return Cause(
                        "padding",
                        f"the gradient with `{path}` off by {by:+d} along its axis {axis}: another "
                        "padding, or the number of another step",
                    )
    return None


def _shift(x: np.ndarray, by: int, axis: int) -> np.ndarray:
    """Moved along an axis, zero where nothing comes."""
    moved = np.roll(x, by, axis)
    np.moveaxis(moved, axis, 0)[slice(by) if by > 0 else slice(by, None)] = 0
    return moved


def _subsets(ndim: int) -> Iterator[tuple[int, ...]]:
    """Axes to sum over: some, not none."""
    for count in range(1, ndim + 1):
        yield from itertools.combinations(range(ndim), count)


def _changes(pair: Pair) -> Iterator[tuple[Cause, Arrays, Arrays]]:
    """Causes, with the inputs and errors that would show them."""
    inputs, errors, batch = pair.context.inputs, pair.context.errors, pair.context.batch
    if batch is not None and batch > 1:
        for name, move in _MOVES.items():
            moved = {path: move(e, 1) if _has(e, batch, 1) else e for path, e in errors.items()}
            yield Cause("another error", f"the gradient under the dy of {name}"), inputs, moved
        own = {path: x for path, x in inputs.items() if _has(x, batch, 0)}
        for chosen in [own, *({path: x} for path, x in own.items() if len(own) > 1)]:
            for name, move in _MOVES.items():
                names = ", ".join(f"`{path}`" for path in chosen)
                cause = Cause(
                    "another example", f"the gradient with {names} of {name}: stale residuals"
                )
                yield cause, {**inputs, **{path: move(x, 0) for path, x in chosen.items()}}, errors
        for name, place in (("last", -1), ("first", 0)):
            cause = Cause("left out", f"the {name} example is left out of the sum")
            yield cause, inputs, {path: _without(e, batch, place) for path, e in errors.items()}
    for path, x in inputs.items():
        if x.dtype.kind == "f" and x.ndim > 1 and x.shape[-1] == x.shape[-2] > 1:
            cause = Cause("transposed", f"the gradient with `{path}` transposed")
            yield cause, {**inputs, path: np.swapaxes(x, -1, -2)}, errors
    for path, error in errors.items():
        if len(errors) > 1 and error.any():
            cause = Cause("output ignored", f"the error of the output `{path}` is ignored")
            yield cause, inputs, {**errors, path: np.zeros_like(error)}
    squared = {path: error * error for path, error in errors.items()}
    yield Cause("nonlinear", "dy is multiplied in twice: its square comes back"), inputs, squared
    for path, x in inputs.items():
        for name, value in (("1", np.ones_like), ("0", np.zeros_like)):
            if path != pair.path and x.dtype.kind in "fb" and (x != value(x)).any():
                word = "the mask" if x.dtype == bool else "the factor"
                cause = Cause("input ignored", f"{word} `{path}` is taken as {name}")
                yield cause, {**inputs, path: value(x)}, errors


_MOVES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "the example before": lambda x, axis: np.roll(x, 1, axis),
    "the example after": lambda x, axis: np.roll(x, -1, axis),
    "the examples in reverse": lambda x, axis: np.flip(x, axis),
}


def _has(x: np.ndarray, batch: int, axis: int) -> bool:
    return x.ndim > axis and x.shape[axis] == batch


def _without(error: np.ndarray, batch: int, place: int) -> np.ndarray:
    """The errors of all examples but one."""
    if not _has(error, batch, 1):
        return error
    error = error.copy()
    error[:, place] = 0
    return error
