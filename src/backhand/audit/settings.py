"""The references that a rule would be right for if it did not use one of its settings."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from backhand.catalogue import Row
from backhand.visit import PyTree

Reference: TypeAlias = Callable[..., PyTree]

MOST = 6
"""So many are tried, and no more."""


def of_row(row: Row) -> Iterator[tuple[str, Row]]:
    """A row without one of its settings, by what the setting then is.

    Example:
        >>> from backhand import ops
        >>> row = Row("ops.leaky_relu", ops.leaky_relu, (), {"negative_slope": 0.3})
        >>> [name for name, other in of_row(row)]
        ['negative_slope=0.01']
    """
    for name in row.settings:
        settings = {other: value for other, value in row.settings.items() if other != name}
        plain = getattr(row.subject, "forward", row.subject)
        parameter = inspect.signature(plain).parameters.get(name)
        value = "its default" if parameter is None else repr(parameter.default)
        yield f"{name}={value}", dataclasses.replace(row, settings=settings)


def of_function(
    reference: Reference, arguments: tuple[PyTree, ...], names: tuple[str, ...]
) -> dict[str, Reference]:
    """A function with another value of a setting, by "name=value".

    Settings are arguments that are no arrays, and what is given by name alone: each at its default,
    a number also at 0 and at 1.

    Example:
        >>> def scaled(x, by=2.0):
        ...     return by * x
        >>> list(of_function(scaled, (1, 3.0), ("x", "by")))[:2]
        ['x=0', 'by=2.0']
    """
    try:
        parameters = inspect.signature(reference).parameters
    except (TypeError, ValueError):
        return {}
    own = getattr(reference, "func", reference)
    defaults = {name: p.default for name, p in inspect.signature(own).parameters.items()}
    found: dict[str, Reference] = {}
    for place, (name, value) in enumerate(zip(names, arguments, strict=True)):
        for other in _others(value, defaults.get(name)):
            found[f"{name}={other!r}"] = functools.partial(_at, reference, place, other)
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            for other in _others(parameter.default, defaults.get(name)):
                found[f"{name}={other!r}"] = functools.partial(reference, **{name: other})
    return dict(list(found.items())[:MOST])


def _at(reference: Reference, place: int, value: Any, *arguments: PyTree) -> PyTree:
    """The reference, one of its arguments another."""
    return reference(*arguments[:place], value, *arguments[place + 1 :])


def _others(value: Any, default: Any) -> list[Any]:
    """What else a setting may be: its default; of a number 0 and 1; of a flag the other."""
    found = [default] if isinstance(default, bool | int | float | str) else []
    if isinstance(value, bool):
        found.append(not value)
    elif isinstance(value, int | float):
        found += [type(value)(0), type(value)(1)]
    elif not isinstance(value, str):
        return []
    return [other for other in dict.fromkeys(found) if other != value]


def references(
    subject: Any, reference: Reference, arguments: tuple[PyTree, ...], names: tuple[str, ...]
) -> Mapping[str, Reference]:
    """The references by the setting that they leave out, of whatever `bh.check` takes."""
    if isinstance(subject, Row):
        return {name: other.reference for name, other in of_row(subject)}
    return of_function(reference, arguments, names)
