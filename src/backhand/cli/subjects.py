"""What `bh.compare` and `bh.check` are to be given, from a target and arrays in words."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from backhand.audit import Audit, Report
from backhand.catalogue import ROWS, Row
from backhand.cli.arguments import arrays, parameters
from backhand.cli.targets import BadUsage, call, guarded, load, required
from backhand.gradients import Objective
from backhand.protocol import Layer, Op, suggestion

Given = tuple[Any, ...] | Audit | Report
"""Arguments, or what somebody has made of them already."""


def of_compare(target: str) -> Given:
    """The arguments of `bh.compare`, or its report.

    Raises:
        BadUsage: if the target is no function without required arguments that gives either.
    """
    function = load(target)
    needs = "a function without required arguments that returns what bh.compare takes"
    forms = "(objective, params, batch) or (f, g, *arguments)"
    if isinstance(function, Op | Layer | Objective | Row) or not callable(function):
        raise BadUsage(f"{target} is {_kind(function)}; name {needs}, {forms}")
    if missing := required(function):
        raise BadUsage(f"{target} needs {', '.join(missing)}; name {needs}, {forms}")
    result = call(target, function)
    if not isinstance(result, tuple | Audit | Report):
        raise BadUsage(
            f"{target} returned {_kind(result)}; it must return {forms} as a tuple, or the report"
        )
    return result


def of_check(target: str, texts: Sequence[str] = (), seed: int = 0) -> list[Given]:
    """The arguments of `bh.check`, for each audit that the target stands for.

    Args:
        target: a row of the catalogue, an op, a layer, a function, or a function without required
            arguments that gives the arguments of `bh.check` or its audit.
        texts: arrays in words, one for each argument; of a layer, its input.
        seed: of the arrays.

    Raises:
        BadUsage: if the target is none of these, or its arguments are not known.
    """
    rows = _rows_named(target)
    subject: Any = None if rows else load(target)
    rows = rows or [row for row in ROWS if row.subject is subject and not texts]
    if rows and texts:
        raise BadUsage(
            f"{target} is a row of the catalogue, which has its own arguments; leave --arg out, or "
            f"name the function, as in backhand.{target.replace('.', ':', 1)}"
        )
    if rows:
        return [(row,) for row in rows]
    if isinstance(subject, Row):
        return [(subject,)]
    made = isinstance(subject, Op | Layer | Objective)
    if not made and not callable(subject):
        raise BadUsage(f"{target} is {_kind(subject)}; name an op, a layer, or a function")
    if not made and not required(subject) and not (texts and _takes_some(subject)):
        result = call(target, subject)
        if texts and (isinstance(result, tuple | Audit | Report | Row) or not callable(result)):
            raise BadUsage(f"{target} returned {_kind(result)}, to which no --arg can be given")
        if isinstance(result, tuple) and _is_compared(result):
            raise BadUsage(
                f"{target} returned what bh.compare takes: use `backhand compare {target}`"
            )
        if isinstance(result, tuple | Audit | Report):
            return [result]
        if isinstance(result, Row):
            return [(result,)]
        subject = result
    if not texts:
        raise BadUsage(_no_arguments(target, subject))
    given = arrays(texts, seed)
    if isinstance(subject, Layer):
        if len(given) != 1:
            raise BadUsage(f"{target} is a layer of one input; give one --arg, got {len(given)}")
        made_parameters = guarded(f"{target}.init", parameters, subject, *given, seed)
        return [(subject, made_parameters, *given)]
    return [(subject, *given)]


def _is_compared(given: tuple[Any, ...]) -> bool:
    """Whether a tuple begins with two functions; a module, which is a tree, is an argument."""
    return len(given) > 1 and all(callable(x) and jax.tree.leaves(x) == [x] for x in given[:2])


def _rows_named(target: str) -> list[Row]:
    """The rows of a name, "ops.linear", or the one of a whole description.

    Raises:
        BadUsage: for what can only be the name of a row, and is none.
    """
    rows = [row for row in ROWS if target in (row.name, repr(row))]
    names = {row.name for row in ROWS}
    parts = {name.split(".")[0] for name in names}
    if not rows and "." in target and target.split(".")[0] in parts and ":" not in target:
        raise BadUsage(f"the catalogue has no row {target!r}{suggestion(target, names)}")
    return rows


def _no_arguments(target: str, subject: Any) -> str:
    """What to do about a subject whose arguments are not known."""
    other = "name a function without required arguments that returns"
    if isinstance(subject, Objective):
        return f"{target} is an objective; {other} (objective, params, batch)"
    if isinstance(subject, Layer):
        return (
            f"{target} is a layer; give its input, as in --arg 'f32[4,8]', or {other} "
            "(layer, params, x)"
        )
    if not callable(subject):
        return (
            f"{target} returned {_kind(subject)}; it must return (subject, *arguments) as a tuple"
        )
    names = required(subject.forward if isinstance(subject, Op) else subject)
    takes = f"takes {', '.join(names)}" if names else "has no arguments of its own"
    return (
        f"{target} {takes}; give an --arg for each, as in --arg 'f32[4,8]', or {other} "
        "(function, *arguments)"
    )


def _takes_some(function: Callable[..., Any]) -> bool:
    """Whether a function takes any argument, if it needs none."""
    try:
        return bool(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of functions written in C
        return True


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"
