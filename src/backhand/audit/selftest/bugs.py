"""The kinds of bugs that a self-test plants.

Most change one leaf of the cotangents that a right pass gives; some run the right pass on a wrong
dy, or on wrong residuals. All leave a row as it is that has nothing for them to change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.selftest.changes import (
    Change,
    axis_lost,
    back_to_front,
    border,
    element,
    extra_mean,
    floats,
    last_of_odd,
    library,
    missing_mean,
    not_finite,
    offset,
    other_dtype,
    other_shape,
    permuted,
    ragged,
    rolled,
    rounded,
    stride,
    times,
    transposed,
    transposed_shape,
    unmasked,
    unsummed,
    with_mean,
    without_mean,
    wrong_axis,
)
from backhand.audit.selftest.plants import Backward, Bug, Cotangents, Site, leaves_of, replaced
from backhand.visit import PyTree, Residuals

# One leaf -----------------------------------------------------------------------------------------


def _leaf(kind: str, causes: str, change: Change) -> Bug:
    """A bug in one leaf, `change(leaf, site)`: the leaf itself where there is nothing to change."""

    def plant(right: Backward, site: Site) -> Backward:
        def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
            result = right(arguments, residuals, dy)
            return replaced(arguments, result, {site.place: _present(change, site)})

        return wrong

    return Bug(kind, frozenset(causes.split(", ")), plant)


def _present(change: Change, site: Site) -> Callable[[Any], Any]:
    """The change of a leaf that has a cotangent; None stays."""
    return lambda leaf: None if leaf is None else change(leaf, site)


def _swapped(right: Backward, site: Site) -> Backward | None:
    if site.twin is None:
        return None
    here, there = site.place, site.twin

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        result = right(arguments, residuals, dy)
        found = leaves_of(arguments, result)
        a, b = found[here[0]][here[1]], found[there[0]][there[1]]
        if a is None or b is None:
            return result
        swap = {here: lambda _: b.astype(a.dtype), there: lambda _: a.astype(b.dtype)}
        return replaced(arguments, result, swap)

    return wrong


def _left_out(right: Backward, site: Site) -> Backward | None:
    """The sum over the examples stops one too early, in one leaf."""
    if not site.batch or site.batch < 2:
        return None

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        dy_less = _of_batch(dy, site.batch, lambda e: e * _last_less(e))
        less = leaves_of(arguments, right(arguments, residuals, dy_less))
        leaf = less[site.place[0]][site.place[1]]
        return replaced(arguments, right(arguments, residuals, dy), {site.place: lambda _: leaf})

    return wrong


def _last_less(x: Any) -> Any:
    keep = np.ones((len(x), *[1] * (x.ndim - 1)))
    keep[-1] = 0
    return library(x).asarray(keep, x.dtype)


def _at_zero(right: Backward, site: Site) -> Backward:
    """Another derivative where the argument itself is 0, as at a kink."""

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        primal = jax.tree.leaves(arguments[site.place[0]])[site.place[1]]

        def twice(leaf: Any, site: Site) -> Any:
            return library(leaf).where(primal == 0, leaf + leaf, leaf)

        result = right(arguments, residuals, dy)
        return replaced(arguments, result, {site.place: _present(twice, site)})

    return wrong


def _no_identity(right: Backward, site: Site) -> Backward:
    """The way around, x + f(x), is forgotten."""

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        def less(leaf: Any, site: Site) -> Any:
            alike = [e for e in jax.tree.leaves(dy) if e.shape == leaf.shape]
            return leaf - alike[0].astype(leaf.dtype) if alike else leaf

        result = right(arguments, residuals, dy)
        return replaced(arguments, result, {site.place: _present(less, site)})

    return wrong


# The whole pass -----------------------------------------------------------------------------------


def _of_dy(kind: str, causes: str, change: Change) -> Bug:
    """The right pass on a wrong dy."""

    def plant(right: Backward, site: Site) -> Backward:
        return lambda arguments, residuals, dy: right(arguments, residuals, change(dy, site))

    return Bug(kind, frozenset(causes.split(", ")), plant, whole=True)


def _of_residuals(kind: str, causes: str, change: Change) -> Bug:
    """The right pass on wrong residuals."""

    def plant(right: Backward, site: Site) -> Backward:
        return lambda arguments, residuals, dy: right(arguments, change(residuals, site), dy)

    return Bug(kind, frozenset(causes.split(", ")), plant, whole=True)


def _of_batch(tree: PyTree, batch: int | None, change: Callable[[Any], Any]) -> PyTree:
    """A tree, the floating-point leaves that have the batch as their first axis changed."""

    def leaf(x: Any) -> Any:
        return change(x) if floats(x) and x.ndim and x.shape[0] == batch else x

    return jax.tree.map(leaf, tree)


def _roll_batch(tree: PyTree, site: Site) -> PyTree:
    return _of_batch(tree, site.batch, lambda x: library(x).roll(x, 1, 0))


def _numbers(change: Callable[[Any], Any]) -> Change:
    """A change of every floating-point leaf of a tree."""
    return lambda tree, site: jax.tree.map(lambda x: change(x) if floats(x) else x, tree)


def _first_lost(tree: PyTree, site: Site) -> PyTree:
    """The first floating-point leaf of several is zero."""
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    numbers = [index for index, x in enumerate(leaves) if floats(x) and x.size]
    if len(numbers) > 1:
        leaves[numbers[0]] = leaves[numbers[0]] * 0
    return structure.unflatten(leaves)


def _residual_lost(tree: PyTree, site: Site) -> PyTree:
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    numbers = [index for index, x in enumerate(leaves) if floats(x) and x.size]
    if numbers:
        leaves[numbers[-1]] = leaves[numbers[-1]] * 0
    return structure.unflatten(leaves)


def _with_defaults(right: Backward, site: Site) -> Backward | None:
    return site.defaults


def _stale(right: Backward, site: Site) -> Backward | None:
    if site.other is None:
        return None
    return lambda arguments, residuals, dy: right(arguments, site.other, dy)


def _of_last_call(right: Backward, site: Site) -> Backward | None:
    """The dy of the call before is used again."""
    if len(site.dys) < 2:
        return None

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        place = next((i for i, known in enumerate(site.dys) if known is dy), 0)
        return right(arguments, residuals, site.dys[place - 1])

    return wrong


def _mistaken(kind: str, mistake: str, causes: str) -> Bug:
    """The reverse of the row's reference, with a mistake in one of its equations."""
    return Bug(
        kind, frozenset(causes.split(", ")), lambda right, site: site.mistaken(mistake), whole=True
    )


def _input_shifted(right: Backward, site: Site) -> Backward:
    """An input that is kept is off by one along its second axis, as by another padding."""

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        inputs = [
            x
            for x in jax.tree.leaves(arguments)
            if floats(x) and x.ndim > 3 and x.shape[0] == site.batch
        ]
        if len(inputs) != 1:  # attention has several, and no padding
            return right(arguments, residuals, dy)

        def leaf(x: Any) -> Any:
            kept = floats(x) and any(x.shape == own.shape and (x == own).all() for own in inputs)
            return border_lost(library(x).roll(x, 1, 1)) if kept else x

        return right(arguments, jax.tree.map(leaf, residuals), dy)

    return wrong


def border_lost(x: Any) -> Any:
    """The first slice along the second axis is zero."""
    keep = np.ones((1, x.shape[1], *[1] * (x.ndim - 2)))
    keep[:, :1] = 0
    return x * library(x).asarray(keep, x.dtype)


# The structure of the result ----------------------------------------------------------------------


def _no_cotangent(right: Backward, site: Site) -> Backward:
    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        result = right(arguments, residuals, dy)
        return replaced(arguments, result, {site.place: lambda _: None})

    return wrong


def _ones(none: Any) -> np.ndarray:
    return np.ones((), np.float32)


def _extra(right: Backward, site: Site) -> Backward | None:
    """A cotangent where an integer, a boolean or a key has none."""

    def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
        result = right(arguments, residuals, dy)
        for index, argument in enumerate(arguments):
            for place, leaf in enumerate(jax.tree.leaves(argument)):
                if not floats(leaf):
                    return replaced(arguments, result, {(index, place): _ones})
        return result

    return wrong


_ALL: tuple[Bug, ...] = (
    _leaf("sign", "sign", lambda x, site: -x),
    _leaf("factor 1.001", "factor", lambda x, site: times(x, 1.001)),
    _leaf("factor 2", "factor, mean", lambda x, site: times(x, 2.0)),
    _leaf("missing mean", "mean", missing_mean),
    _leaf("mean too many", "mean", extra_mean),
    _leaf("transposed", "transposed", transposed),
    _leaf("reversed axis", "reversed", back_to_front),
    _leaf("off by one", "rolled, reversed", rolled),
    _leaf("slices in another order", "permuted", permuted),
    _leaf("wrong axis", "broadcast, zero", wrong_axis),
    _leaf("dropped term", "dropped", without_mean),
    _leaf("term too many", "dropped, offset", with_mean),
    _leaf("constant added", "offset, spurious", offset),
    _leaf("missing path", "zero", lambda x, site: x * 0),
    _leaf("ragged block", "block, element", ragged),
    _leaf("border of a block", "block, element", border),
    _leaf("every third slice", "block", stride),
    _leaf("odd lengths only", "block, element", last_of_odd),
    _leaf("one element", "element", element),
    _leaf("one NaN", "not finite", not_finite),
    _leaf("not masked", "unmasked, spurious", unmasked),
    _leaf("rounded to bfloat16", "rounded", rounded(jnp.bfloat16)),
    _leaf("rounded to float16", "rounded", rounded(np.float16)),
    _leaf("wrong dtype", "structure", other_dtype),
    _leaf("an axis of one too many", "structure", other_shape),
    _leaf("transposed to another shape", "structure", transposed_shape),
    _leaf("not summed over an axis", "structure", unsummed),
    _leaf("summed over an axis too many", "structure", axis_lost),
    Bug("swapped arguments", frozenset({"swapped"}), _swapped),
    Bug("last example left out", frozenset({"left out", "block"}), _left_out),
    Bug("another derivative at 0", frozenset({"kink", "unmasked"}), _at_zero),
    Bug("way around forgotten", frozenset({"identity", "zero"}), _no_identity),
    Bug("no cotangent", frozenset({"zero"}), _no_cotangent),
    Bug("cotangent of integers", frozenset({"structure"}), _extra, whole=True),
    _of_dy("dy of another example", "another error, rolled", _roll_batch),
    _of_dy(
        "dy taken as 1",
        "dy ignored, zero",
        _numbers(lambda x: x * 0 + library(x).asarray(1, x.dtype)),
    ),
    Bug("dy of the call before", frozenset({"stale", "zero"}), _of_last_call, whole=True),
    _of_dy("dy squared", "nonlinear", _numbers(lambda x: x * x)),
    _of_dy("an output's error dropped", "output ignored, zero", _first_lost),
    _of_residuals(
        "residuals of another example",
        "another example, another error, rolled, local, slices",
        _roll_batch,
    ),
    Bug("residuals of another batch", frozenset({"local", "slices"}), _stale, whole=True),
    _of_residuals("a residual lost", "zero, input ignored, local, slices, dropped", _residual_lost),
    _mistaken("a sum taken for a constant", "sum", "sum, path, zero, dropped, local"),
    _mistaken("one path left out", "path", "path, sum, zero, identity, local, output ignored"),
    _mistaken("the state of the wrong step", "step", "step, padding, rolled"),
    Bug("another padding", frozenset({"padding", "rolled", "zero"}), _input_shifted, whole=True),
    Bug("a setting ignored", frozenset({"setting", "local", "nearly"}), _with_defaults, whole=True),
)

BUGS: dict[str, Bug] = {bug.kind: bug for bug in _ALL}
"""Every kind of bug, by name."""
