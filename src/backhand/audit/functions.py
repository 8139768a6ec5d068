"""Two functions of the same arguments, and their gradients side by side."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.accuracy import context
from backhand.audit.dtypes import coarsest
from backhand.audit.gradient import Rounding, Verdict, errors, judge, tolerance
from backhand.audit.inputs import (
    check_arguments,
    check_outputs,
    check_pure,
    check_same_outputs,
    is_array,
    no_failing_callbacks,
    no_side_effects,
    output_shapes,
    shapes,
)
from backhand.audit.report import Report, Row
from backhand.audit.rows import explained, row_of
from backhand.audit.runs import compiled
from backhand.audit.settings import of_function
from backhand.audit.subject import Leaves, Subject, floating_leaves, pulled
from backhand.audit.subjects import bound
from backhand.differentiable import differentiable
from backhand.gradients import Evaluation, Objective, value_and_grad
from backhand.protocol import Layer, shapes_of
from backhand.visit import PyTree

Returns: TypeAlias = Literal["value", "gradient", "value and gradient"]
RETURNS = ("value", "gradient", "value and gradient")
COTANGENTS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """One way to a gradient: a function, and which of its value and gradient it returns."""

    name: str
    function: Callable[..., Any]
    returns: str

    @property
    def of_first(self) -> bool:
        """Whether the gradient is that of the first argument alone."""
        return self.returns != "value"

    def run(self, subject: Subject, own: Leaves, rest: Leaves, dy: Leaves) -> tuple[Leaves, Leaves]:
        """The leaves of the value, none if it returns none, and of the gradient."""
        if not self.of_first:
            return pulled(
                lambda own: floating_leaves(self.function(*subject.rebuild(own, rest))), own, dy
            )
        result = self.function(*subject.rebuild(own, rest))
        if self.returns == "gradient":
            if _has_aux(result) and not isinstance(subject.arguments[0], tuple):
                result = result[0]
            return [], subject.of_first(result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                "it must return a pair (value, gradient), as jax.value_and_grad does, got "
                f"{type(result).__name__}"
            )
        value, gradient = result
        value = value[0] if _has_aux(value) else value
        if [jnp.shape(leaf) for leaf in jax.tree.leaves(value)] != [()]:
            raise ValueError("the value beside its gradient must be a scalar")
        return floating_leaves(value), subject.of_first(gradient)

    def on_host(self) -> "Way":
        """The same for a function of NumPy, which JAX cannot trace: its gradient is called back."""

        def call(*args: PyTree) -> Any:
            gradient = jax.tree.map(_shaped, args[0])
            floats = [x.dtype for x in jax.tree.leaves(gradient)]
            value = jax.ShapeDtypeStruct((), max(floats, key=lambda d: jnp.finfo(d).bits))
            given = gradient if self.returns == "gradient" else (value, gradient)

            def host(*args: PyTree) -> Any:
                result = self.function(*jax.tree.map(np.asarray, args))
                return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), result, given)

            return jax.pure_callback(host, given, *args)

        return dataclasses.replace(self, function=call)


def _has_aux(result: Any) -> bool:
    """Whether this is a pair of a result and what comes beside it, as with has_aux=True."""
    return isinstance(result, tuple) and len(result) == 2


def _shaped(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def compare_functions(
    f: Any,
    g: Any,
    args: tuple[PyTree, ...],
    given: Mapping[str, Any],
    rtol: float | None,
    returns: Returns | tuple[Returns, Returns],
) -> Report:
    """`bh.compare(f, g, *args)`; `given` are key and training, for an objective."""
    kinds = (returns, returns) if isinstance(returns, str) else returns
    for kind in kinds:
        if kind not in RETURNS:
            raise ValueError(f"returns must be one of {', '.join(RETURNS)}, got {kind!r}")
    ways = tuple(_way(x, kind, given) for x, kind in zip((f, g), kinds, strict=True))
    if ways[0].name == ways[1].name:
        ways = tuple(dataclasses.replace(w, name=f"{w.name} {n}") for n, w in enumerate(ways, 1))
    known = [bound(way.name, way.function, args)[0] for way in ways]
    # A function of *args has no names for them: the other may.
    names = min(known, key=lambda names: sum(name[-1:].isdigit() for name in names))
    check_arguments(ways[0].name, args, names)
    first = any(way.of_first for way in ways)
    held = frozenset(range(1, len(args))) if first else frozenset()
    subject = Subject(ways[0].name, ways[0].function, args, names, held=held)
    return compare_ways(ways, subject, rtol, returns != "value")


def compare_ways(
    ways: tuple[Way, ...], subject: Subject, rtol: float | None, sure: bool = True
) -> Report:
    """Two ways to one gradient, side by side.

    Args:
        ways: the two.
        subject: whose arrays they take; its own function is not run.
        rtol: another tolerance.
        sure: whether what they return is what they were said to.

    Raises:
        TypeError: for a way that does not run, or has nothing to differentiate.
        ValueError: for outputs or gradients of different trees.
    """
    first = any(way.of_first for way in ways)
    if not subject.paths:
        raise TypeError(
            f"{ways[0].name} is not differentiable: "
            f"{'its first argument' if first else 'none of its arguments'} holds floating-point "
            "arrays; integers, booleans and keys have no gradient"
        )
    given_leaves = subject.given()
    own, rest = shapes_of(given_leaves)
    cotangents, output = _cotangents(subject, ways, own, rest, first)
    ways = tuple(_runnable(way, subject, own, rest, cotangents[0]) for way in ways)
    with jax.numpy_dtype_promotion("standard"):
        for way in ways:
            check_pure(way.name, functools.partial(way.run, subject), own, rest, cotangents[0])
    if not sure:
        _check_values(ways, subject, own, rest)
    # A constant of the functions may be in float32 where the arguments are not.
    names = " or ".join(way.name for way in ways)
    promoting = jax.numpy_dtype_promotion("standard")
    with no_side_effects(ways[0].name), no_failing_callbacks(names), promoting:
        own, rest = jax.tree.map(jnp.asarray, given_leaves)
        return _report(_Sides(subject, ways, cotangents, output), own, rest, rtol)


class _Sides:
    """Both ways, compiled once for each dtype."""

    def __init__(
        self, subject: Subject, ways: tuple[Way, ...], cotangents: list[Leaves], output: PyTree
    ):
        self.ways, self.cotangents, self.output = ways, cotangents, output
        self.leaves = [y for y in jax.tree.leaves(output) if jnp.issubdtype(y.dtype, jnp.floating)]
        plain = next((way.function for way in reversed(ways) if not way.of_first), None)
        others = of_function(plain, subject.arguments, subject.names) if plain else {}
        self.subject = dataclasses.replace(subject, reference=plain, others=others)
        self._runs = [compiled(functools.partial(way.run, subject)) for way in ways]

    def run(self, own: Leaves, rest: Leaves) -> list[tuple[Leaves, Leaves]]:
        """For each way its value's leaves, and its gradient's (S, *shape)."""
        found = []
        for run in self._runs:
            results = [run(own, rest, dy) for dy in self.cotangents]
            gradients = zip(*(gradient for _, gradient in results), strict=True)
            found.append(
                (
                    [np.asarray(y, np.float64)[None] for y in results[0][0]],
                    [np.stack([np.asarray(x, np.float64) for x in leaf]) for leaf in gradients],
                )
            )
        return found


def _way(function: Any, returns: str, given: Mapping[str, Any]) -> Way:
    """A function, an op, a layer, an objective or its evaluation as a way to a gradient."""
    own = getattr(function, "__name__", type(function).__name__)
    name = str(getattr(function, "name", None) or own)
    if isinstance(function, Layer):
        return Way(name, differentiable(function), returns)
    if isinstance(function, Objective):
        function, name = value_and_grad(function), "objective"
    if isinstance(function, Evaluation):
        made = function

        def evaluate(params: PyTree, batch: PyTree) -> Any:
            return made(params, batch, **given)

        return Way(name, evaluate, "value and gradient")
    return Way(name, function, returns)


def _runnable(way: Way, subject: Subject, own: Leaves, rest: Leaves, dy: Leaves) -> Way:
    """The way, on the host if it is a gradient that JAX cannot trace.

    Raises:
        TypeError: if it does not run.
    """
    try:
        shapes(way.name, functools.partial(way.run, subject), own, rest, dy)
    except TypeError as error:
        if way.of_first and _asks_for_numpy(error) and _is_of_numpy(way, subject, dy):
            return way.on_host()
        raise
    return way


def _asks_for_numpy(error: TypeError) -> bool:
    """Whether a function cannot be traced because it makes NumPy's arrays, or changes its own."""
    cause = error.__context__
    arrays = (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError)
    return isinstance(cause, arrays) or "item assignment" in str(cause)


def _is_of_numpy(way: Way, subject: Subject, dy: Leaves) -> bool:
    """Whether a gradient comes out of NumPy's arrays, and is made of them."""
    try:
        own, rest = jax.tree.map(np.asarray, subject.given())
        _, gradient = way.run(subject, own, rest, dy)
    except Exception:  # what is wrong was said when it was traced
        return False
    return all(isinstance(leaf, np.ndarray | np.generic) for leaf in gradient)


def _check_values(ways: tuple[Way, ...], subject: Subject, own: Leaves, rest: Leaves) -> None:
    """Refuses gradients that are taken for values: theirs would be second derivatives.

    Raises:
        ValueError: if both give the tree of their first argument, and it is no single array.
    """

    def arrays(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x if is_array(x) else None, tree)

    first = subject.arguments[0]
    if is_array(first) or any(way.of_first for way in ways):
        return
    for way in ways:
        y = jax.eval_shape(
            lambda own, rest, f=way.function: arrays(f(*subject.rebuild(own, rest))), own, rest
        )
        if jax.tree.map(jnp.shape, y) != jax.tree.map(jnp.shape, arrays(first)):
            return
    raise ValueError(
        f"{ways[0].name} and {ways[1].name} give the tree of their first argument, as gradients "
        'do: say returns="gradient", or returns=("value", "value") if they are no gradients'
    )


def _cotangents(
    subject: Subject, ways: tuple[Way, ...], own: Leaves, rest: Leaves, first: bool
) -> tuple[list[Leaves], PyTree]:
    """The errors that the values are pulled back from, 1 for a scalar, else random ones; the value.

    Raises:
        ValueError: for values of different trees.
    """
    outputs = {}
    for way in ways:
        if not way.of_first:
            call = way.function
            outputs[way.name] = output_shapes(
                way.name, lambda o, r, call=call: call(*subject.rebuild(o, r)), own, rest
            )
            check_outputs(way.name, outputs[way.name])
    for name, y in outputs.items():
        if first and [leaf.shape for leaf in jax.tree.leaves(y)] != [()]:
            raise ValueError(
                f"{name} must give a scalar, to be compared with a function that returns a gradient"
            )
    if len(outputs) == 2:
        check_same_outputs(" and ".join(outputs), *outputs.values())
    output = next(iter(outputs.values()), jax.ShapeDtypeStruct((), jnp.float32))
    leaves = jax.tree.leaves(output)
    leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if all(leaf.shape == () for leaf in leaves) and len(leaves) == 1:
        return [[np.ones((), np.float32)]], output
    rng = np.random.default_rng(0)
    errors = [
        [np.asarray(rng.standard_normal(leaf.shape)).astype(jnp.bfloat16) for leaf in leaves]
        for _ in range(COTANGENTS)
    ]
    return errors, output


def _report(sides: _Sides, own: Leaves, rest: Leaves, rtol: float | None) -> Report:
    subject, ways = sides.subject, sides.ways
    dtypes = [leaf.dtype for leaf in own]
    for way in ways:
        found = coarsest(functools.partial(way.run, subject), own, rest, sides.cotangents[0])
        dtypes += [found.computed] if found.computed is not None else []
    dtype = max(dtypes, key=lambda d: float(jnp.finfo(d).eps))
    length = max(leaf.size for leaf in (*own, *rest))
    (y, ours), (other_y, other) = sides.run(own, rest)
    if not y or not other_y:  # one of them returns a gradient alone
        y = other_y = y or other_y
    limit = tolerance(dtype, length) if rtol is None else rtol
    verdicts = judge(subject.paths, ours, other, None, dtype, Rounding(length))
    outputs = judge([""] * len(y), y, other_y, None, dtype, Rounding(length))
    rows = []
    for i, (path, verdict) in enumerate(zip(subject.paths, verdicts, strict=True)):
        leaf = row_of(path, ours[i], other[i], limit)
        agrees = leaf.agrees if rtol is not None else verdict.agrees
        where = leaf.where[1:] if agrees else verdict.where
        leaf = dataclasses.replace(leaf, shape=tuple(own[i].shape), dtype=str(own[i].dtype))
        rows.append(dataclasses.replace(leaf, where=where, agrees=agrees))
    if rtol is None and not all(each.agrees for each in (*verdicts, *outputs)):
        rows, outputs = _settled(sides, rows, outputs, (y, ours), (other_y, other), dtype)
    places = {path: place for place, path in enumerate(subject.order)}
    rows.sort(key=lambda row: places.get(row.path, len(places)))
    return Report(
        tuple(explained(rows, lambda: context(sides))),
        (ways[0].name, ways[1].name),
        (_size(y), _size(other_y)),
        limit,
        outputs_agree=None if rtol is not None else all(each.agrees for each in outputs),
        scalar=len(y) == 1 and y[0].size == 1,
    )


def _settled(
    sides: _Sides,
    rows: list[Row],
    outputs: tuple[Verdict, ...],
    ours: tuple[Leaves, Leaves],
    other: tuple[Leaves, Leaves],
    dtype: Any,
) -> tuple[list[Row], tuple[Verdict, ...]]:
    """What differs by rounding alone agrees after all: in float64, and as near to that as g is."""
    subject = sides.subject
    with jax.enable_x64(True):
        try:
            own, rest = subject.at(jnp.float64)
            wide, truth = sides.run(own, rest)
        except Exception:  # it does not run in float64: the verdict stands
            return rows, outputs
        found = [
            coarsest(functools.partial(w.run, subject), own, rest, sides.cotangents[0])
            for w in sides.ways
        ]
    exact = all(each.computed in (None, jnp.float64) for each in found)
    length = max(leaf.size for leaf in (*own, *rest))

    def settle(part: int) -> list[bool]:
        names = [""] * len(truth[part])
        if jnp.dtype(dtype) == jnp.float64:
            return [each.agrees for each in judge(names, ours[part], other[part], None, dtype)]
        parts = (truth[part], ours[part], other[part])
        noise = [errors(t, a, b) for t, a, b in zip(*parts, strict=True)]
        near = judge(names, ours[part], truth[part], other[part], dtype, Rounding(length))
        if not exact:
            return [each.agrees for each in near]
        known = Rounding(length, noise)
        same = judge(names, wide[part], truth[part], None, jnp.float64, known)
        return [a.agrees and b.agrees for a, b in zip(near, same, strict=True)]

    settled = []
    for place, (row, agrees) in enumerate(zip(rows, settle(1), strict=True)):
        difference = float(np.abs(wide[1][place] - truth[1][place]).max(initial=0))
        if agrees and not row.agrees:
            note = f"rounding: in float64 the two differ by {difference:.1e}"
            row = dataclasses.replace(row, agrees=True, note=note)
        elif not row.agrees:
            row = dataclasses.replace(row, gradients=(wide[1][place], truth[1][place]))
        settled.append(row)
    if len(wide[0]) == len(truth[0]) == len(outputs):
        outputs = tuple(
            each._replace(agrees=each.agrees or agrees)
            for each, agrees in zip(outputs, settle(0), strict=True)
        )
    return settled, outputs


def _size(y: Leaves) -> float:
    """A scalar itself; of anything else the norm."""
    if len(y) == 1 and y[0].size == 1:
        return float(y[0].reshape(()))
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in y)))
