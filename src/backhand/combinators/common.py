"""What every combinator does with the layers it is given."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import Array

from backhand.protocol import Layer, split_key
from backhand.visit import PyTree

Parts = Mapping[str | int, Layer]


def parts_of(combinator: str, layers: tuple[Layer, ...], named: Mapping[str, Layer]) -> Parts:
    """The layers by name, or by position.

    Raises:
        ValueError: if there is none, or both kinds.
        TypeError: for something that is not a layer.
    """
    if layers and named:
        raise ValueError(
            f"{combinator} takes layers by position or by name, not both; got {len(layers)} "
            f"positional and {', '.join(named)}: name all of them"
        )
    parts: dict[str | int, Layer] = {}
    parts.update(named)
    parts.update(enumerate(layers))
    if not parts:
        raise ValueError(f"{combinator} needs at least one layer, got none")
    for name, part in parts.items():
        need_layer(combinator, part, f" at {name!r}")
    return parts


def need_layer(combinator: str, inner: Any, where: str = "") -> None:
    """Refuses what is no layer.

    Raises:
        TypeError: saying what it is.
    """
    if not isinstance(inner, Layer):
        advice = (
            "give its layers one by one"
            if isinstance(inner, list | tuple)
            else "call the function that makes the layer: relu() rather than relu"
        )
        raise TypeError(f"{combinator} takes layers, got {inner!r}{where}; {advice}")


def pack(parts: Parts, values: Mapping[str | int, Any]) -> PyTree:
    """One value per layer: a dict for named layers, a tuple for positional ones."""
    ordered = {name: values[name] for name in parts}
    return ordered if isinstance(next(iter(parts)), str) else tuple(ordered.values())


def check_params(combinator: str, parts: Parts, params: PyTree) -> None:
    """Refuses parameters of another model.

    Raises:
        ValueError: saying what there should be.
    """
    named = isinstance(next(iter(parts)), str)
    if named and isinstance(params, dict):
        fits = params.keys() == parts.keys()
    else:
        fits = not named and isinstance(params, tuple | list) and len(params) == len(parts)
    if not fits:
        expected = f"a dict of {', '.join(map(str, parts))}" if named else f"{len(parts)} entries"
        got = type(params).__name__
        if isinstance(params, dict):
            got = f"a dict of {', '.join(map(str, params))}"
        elif isinstance(params, tuple | list):
            got = f"a {got} of {len(params)}"
        raise ValueError(
            f"these are not the parameters of this {combinator}, which are {expected}; got {got}: "
            "make them with init"
        )


def uses_of(parts: Parts) -> frozenset[str]:
    """The side inputs that any of the layers uses."""
    return frozenset().union(*(part.uses for part in parts.values()))


def side_of(part: Layer, side: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The side inputs that a layer uses; its own key, by its place."""
    own = {name: value for name, value in side.items() if name in part.uses}
    if "key" in own:
        own["key"] = split_key(own["key"], index)
    return own


def keys_of(side: Mapping[str, Any], depth: int) -> Array | None:
    """A key for each step of a scan, (depth,); None without a key."""
    key = split_key(side.get("key"), depth)
    return None if key is None else jax.random.split(key, depth)


def with_key(side: Mapping[str, Any], key: Array | None) -> dict[str, Any]:
    """The side inputs of one step, with its own key."""
    return {**side, "key": key} if "key" in side else dict(side)


def around(
    name: str,
    inner: Layer,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    init: Callable[..., Any] | None = None,
) -> Layer:
    """A layer around one other, with its side inputs and the names of its parts.

    Raises:
        TypeError: if it is no layer.
    """
    need_layer(name, inner)
    return Layer(name, init or inner.init, forward, backward, inner.uses, inner.parts, inner)


def add_errors(a: PyTree, b: PyTree) -> PyTree:
    """The sum of two errors of one array; None is no error."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Array):
        return a + b
    return jax.tree.map(add_errors, a, b, is_leaf=lambda leaf: leaf is None)


def same_shape(what: str, got: PyTree, other: str, expected: PyTree) -> None:
    """Refuses two trees of arrays that differ in structure, shape or dtype.

    Raises:
        ValueError: saying which is which.
    """

    def described(tree: PyTree) -> list[str]:
        return [
            f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]

    trees: list[Any] = [jax.tree.structure(got), jax.tree.structure(expected)]
    if trees[0] != trees[1] or described(got) != described(expected):
        raise ValueError(
            f"{what} must have the shape and dtype of {other}: "
            f"{', '.join(described(expected))}; got {', '.join(described(got))}"
        )


def part_of(combinator: str, x: PyTree, part: str | int) -> PyTree:
    """One part of a dict or a tuple.

    Raises:
        TypeError: if x is neither.
        ValueError: if it has no such part.
    """
    if not isinstance(x, dict | tuple):
        raise TypeError(
            f"{combinator} takes {part!r} of a dict or a tuple of inputs, got "
            f"{getattr(x, 'dtype', type(x).__name__)}"
        )
    known = x if isinstance(x, dict) else dict(enumerate(x))
    if part not in known:
        raise ValueError(f"{combinator}: the input has no part {part!r}, only {sorted(known)}")
    return known[part]


def with_part(x: PyTree, part: str | int, value: PyTree) -> PyTree:
    """A dict or a tuple with another value for one part."""
    if isinstance(x, dict):
        return {**x, part: value}
    return tuple(value if index == part else other for index, other in enumerate(x))


@contextlib.contextmanager
def located(combinator: str, name: str | int) -> Iterator[None]:
    """Notes on an error where in the model it came from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(f"in layer {name!r} of {combinator}")
        raise
