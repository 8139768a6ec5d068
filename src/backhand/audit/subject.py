"""Anything that has a gradient, in one form: arrays, and two ways to pull back an error.

Of an op, a layer, an objective or a `jax.custom_vjp` function the hand-written rule is run as it
is, so that what it gives is seen before JAX tidies it up.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from backhand.arrays import is_floating
from backhand.audit.inputs import counted, is_array
from backhand.visit import PyTree

Leaves: TypeAlias = "list[Any]"
Fault: TypeAlias = "tuple[str, str]"
LOW = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A hand-written rule: `forward(*arguments) -> (y, residuals)` and its reverse.

    `backward(arguments, residuals, dy)` gives one cotangent per argument.
    """

    forward: Callable[..., tuple[PyTree, PyTree]]
    backward: Callable[[tuple[PyTree, ...], PyTree, PyTree], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is audited, at one point.

    Attributes:
        name: what reports call it.
        function: `(*arguments) -> y`, which `jax.grad` differentiates by the rule.
        arguments: of the function; leaves that are no arrays are settings, held fixed.
        names: of the arguments; "" where the paths inside of it say enough.
        rule: the hand-written rule; None where JAX alone can run it.
        reference: `(*arguments) -> y`, which JAX differentiates; None where there is none.
        held: the arguments that are not differentiated, whatever their dtype.
        wide: paths of the leaves that stay in float32 where others are in less; None for those
            that are wider than another leaf.
        order: of the paths in a report; others follow.
        note: what the reference is, where it was not given.
        kept: paths of leaves, or of trees of them, that are not differentiated either.
        others: references with another setting, by "name=value".
    """

    name: str
    function: Callable[..., PyTree]
    arguments: tuple[PyTree, ...]
    names: tuple[str, ...]
    rule: Rule | None = None
    reference: Callable[..., PyTree] | None = None
    held: frozenset[int] = frozenset()
    wide: frozenset[str] | None = None
    order: tuple[str, ...] = ()
    note: str = ""
    kept: frozenset[str] = frozenset()
    others: Mapping[str, Callable[..., PyTree]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _flat(self) -> tuple[list[str], list[Any], list[int], Any]:
        """Paths, leaves, the argument that each is in, and the structure of all."""
        entries, structure = jax.tree_util.tree_flatten_with_path(self.arguments)
        owner = [int(path[0].idx) for path, _ in entries]
        paths = []
        for path, _ in entries:
            inside = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            paths.append("/".join(part for part in (self.names[path[0].idx], inside) if part))
        repeated = {path for path in paths if paths.count(path) > 1}
        paths = [f"{i}/{p}" if p in repeated else p for i, p in zip(owner, paths, strict=True)]
        return paths, [leaf for _, leaf in entries], owner, structure

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """Of the differentiable leaves, in the order of the arguments' own."""
        return tuple(self._flat[0][place] for place in self._places)

    @functools.cached_property
    def _places(self) -> list[int]:
        paths, leaves, owner, _ = self._flat
        return [
            place
            for place, leaf in enumerate(leaves)
            if is_array(leaf)
            and is_floating(leaf)
            and owner[place] not in self.held
            and not any(is_inside(paths[place], kept) for kept in self.kept)
        ]

    @functools.cached_property
    def _arrays(self) -> list[int]:
        return [place for place, leaf in enumerate(self._flat[1]) if is_array(leaf)]

    @property
    def array_paths(self) -> list[str]:
        """Of all arrays, in the order of the arguments' own."""
        return [self._flat[0][place] for place in self._arrays]

    @property
    def leaves(self) -> Leaves:
        """The differentiable leaves as they were given."""
        return [self._flat[1][place] for place in self._places]

    @functools.cached_property
    def _narrow(self) -> set[int]:
        """The places of the floating-point leaves that take on a lower dtype."""
        paths, leaves, _, _ = self._flat
        floating = [place for place in self._arrays if is_floating(leaves[place])]
        if self.wide is not None:
            return {place for place in floating if paths[place] not in self.wide}
        sizes = {place: jnp.dtype(leaves[place].dtype).itemsize for place in floating}
        smallest = min(sizes.values(), default=0)
        return {place for place in floating if smallest >= 4 or sizes[place] == smallest}

    @property
    def narrows(self) -> bool:
        """Whether any leaf takes on a lower dtype."""
        return bool(self._narrow)

    def exact(self) -> dict[int, np.ndarray]:
        """The floating-point leaves in float64, by place."""
        leaves = self._flat[1]
        return {
            place: np.asarray(leaves[place], np.float64)
            for place in self._arrays
            if is_floating(leaves[place])
        }

    def at(self, dtype: DTypeLike, rounded: DTypeLike | None = None) -> tuple[Leaves, Leaves]:
        """The arrays in a dtype: the differentiable leaves, and the others.

        Args:
            dtype: of the floating-point leaves; wide ones have at least float32.
            rounded: a lower dtype that the numbers are rounded to before.
        """
        leaves = self._flat[1]
        own: Leaves = []
        rest: Leaves = []
        for place in self._arrays:
            leaf = leaves[place]
            if is_floating(leaf):
                value = np.asarray(leaf, np.float64)
                for step in (rounded, dtype):
                    if step is not None:
                        value = np.asarray(value).astype(self._dtype(place, step))
                leaf = jnp.asarray(value)
            else:
                leaf = jnp.asarray(leaf)
            (own if place in self._places else rest).append(leaf)
        return own, rest

    def shaped(self, dtype: DTypeLike) -> tuple[Leaves, Leaves]:
        """The shapes and dtypes of what `at` gives; nothing is put on a device for them."""
        own: Leaves = []
        rest: Leaves = []
        for place in self._arrays:
            leaf = self._flat[1][place]
            kind = self._dtype(place, dtype) if is_floating(leaf) else jnp.result_type(leaf)
            shape = jax.ShapeDtypeStruct(jnp.shape(leaf), kind)
            (own if place in self._places else rest).append(shape)
        return own, rest

    def given(self) -> tuple[Leaves, Leaves]:
        """What `at` gives, in the dtypes of the arguments themselves."""
        own: Leaves = []
        rest: Leaves = []
        for place in self._arrays:
            (own if place in self._places else rest).append(self._flat[1][place])
        return own, rest

    def of_first(self, tree: PyTree) -> Leaves:
        """The leaves of a gradient that belong to the differentiable leaves of the first argument.

        Raises:
            ValueError: for a tree of another structure.
        """
        _, leaves, owner, _ = self._flat
        structure: Any = jax.tree.structure(self.arguments[0])
        own = [place for place in self._places if owner[place] == 0]
        shapes = [leaves[place].shape for place in own]
        try:
            found = structure.flatten_up_to(tree)
            inside = [place for place, argument in enumerate(owner) if argument == 0]
            chosen = [found[inside.index(place)] for place in own]
        except (TypeError, ValueError):
            # A module's gradient may be its state, whose leaves are in the module's order.
            entries = jax.tree_util.tree_leaves_with_path(self.arguments[0])
            plain = jax.tree_util.DictKey | jax.tree_util.SequenceKey
            module = any(not isinstance(key, plain) for path, _ in entries for key in path)
            chosen = jax.tree.leaves(tree) if module else []
        if [jnp.shape(leaf) for leaf in chosen] != shapes:
            wanted, got = _described(self.arguments[0]), _described(tree)
            if isinstance(tree, type(self.arguments[0])) or not callable(self.arguments[0]):
                raise ValueError(
                    "its gradient must have the tree and the shapes of the first argument, "
                    f"{wanted}; got {got}"
                )
            raise ValueError(
                f"its gradient is of some of the module's arrays alone, {got}, where the module "
                f"has {wanted}; compare the losses themselves, without returns=, or functions of "
                "the parameters that are differentiated, as nnx.split gives them"
            )
        return chosen

    def named(self, dtype: DTypeLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays by path: numbers, and keys apart from them."""
        paths, leaves, _, _ = self._flat
        numbers, keys = {}, {}
        for place in self._arrays:
            leaf = leaves[place]
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                keys[paths[place]] = leaf
            else:
                kind = dtype if is_floating(leaf) else leaf.dtype
                numbers[paths[place]] = np.asarray(leaf).astype(kind)
        return numbers, keys

    def from_named(
        self, numbers: Mapping[str, np.ndarray], keys: Mapping[str, Any]
    ) -> tuple[Leaves, Leaves]:
        """What `at` gives, from arrays by path."""
        own: Leaves = []
        rest: Leaves = []
        for place in self._arrays:
            path = self._flat[0][place]
            leaf = keys[path] if path in keys else jnp.asarray(numbers[path])
            (own if place in self._places else rest).append(leaf)
        return own, rest

    def _dtype(self, place: int, dtype: DTypeLike) -> Any:
        low = jnp.dtype(dtype).itemsize < 4 and place not in self._narrow
        return jnp.dtype(jnp.float32 if low else dtype)

    def rebuild(self, own: Leaves, rest: Leaves) -> tuple[PyTree, ...]:
        """The arguments, from the differentiable leaves and the other arrays."""
        _, leaves, _, structure = self._flat
        own_places, own_left, rest_left = set(self._places), iter(own), iter(rest)
        array_places = set(self._arrays)
        return structure.unflatten(
            [
                (next(own_left) if place in own_places else next(rest_left))
                if place in array_places
                else leaf
                for place, leaf in enumerate(leaves)
            ]
        )

    def value(self, own: Leaves, rest: Leaves) -> Leaves:
        """The floating-point leaves of the output."""
        if self.rule is None:
            return floating_leaves(self.function(*self.rebuild(own, rest)))
        return floating_leaves(self.rule.forward(*self.rebuild(own, rest))[0])

    def reference_value(self, own: Leaves, rest: Leaves) -> Leaves:
        """The floating-point leaves of the reference's output."""
        assert self.reference is not None
        return floating_leaves(self.reference(*self.rebuild(own, rest)))

    def pull(self, own: Leaves, rest: Leaves, dy: Leaves) -> tuple[Leaves, Leaves]:
        """The output's leaves, and the hand-written cotangent of each differentiable leaf."""
        if self.rule is None:
            return pulled(lambda own: self.value(own, rest), own, dy)
        y, cotangents, _ = self.reverse(own, rest, dy)
        found = [
            leaf
            for leaf, place in zip(cotangents, self._arrays, strict=True)
            if place in self._places
        ]
        return floating_leaves(y), [
            jnp.zeros_like(primal) if leaf is None or leaf.dtype == jax.dtypes.float0 else leaf
            for leaf, primal in zip(found, own, strict=True)
        ]

    def automatic(self, own: Leaves, rest: Leaves, dy: Leaves) -> tuple[Leaves, Leaves]:
        """The same by JAX, of the reference."""
        return pulled(lambda own: self.reference_value(own, rest), own, dy)

    def reverse(self, own: Leaves, rest: Leaves, dy: Leaves) -> tuple[PyTree, Leaves, list[Fault]]:
        """The output, what the rule gives for each array, and what is odd in it."""
        assert self.rule is not None
        arguments = self.rebuild(own, rest)
        y, residuals = self.rule.forward(*arguments)
        errors = iter(dy)
        structure: Any
        leaves, structure = jax.tree.flatten(y)
        error = structure.unflatten(
            [
                next(errors).astype(leaf.dtype)
                if is_floating(leaf)
                else np.zeros(leaf.shape, jax.dtypes.float0)
                for leaf in map(jnp.asarray, leaves)
            ]
        )
        cotangents, faults = self._aligned(
            arguments, self.rule.backward(arguments, residuals, error)
        )
        return y, cotangents, faults

    def _aligned(
        self, arguments: tuple[PyTree, ...], cotangents: Any
    ) -> tuple[Leaves, list[Fault]]:
        """The cotangents by array, None where there is none, and the faults of their structure."""
        faults: list[Fault] = []
        paths, leaves, _, _ = self._flat
        if not isinstance(cotangents, tuple | list) or len(cotangents) != len(arguments):
            needed = counted(len(arguments), "argument")
            if isinstance(cotangents, tuple | list):
                message = f"the rule gives {counted(len(cotangents), 'cotangent')} for {needed}"
            else:
                kind = "an array" if is_array(cotangents) else f"a {type(cotangents).__name__}"
                message = f"the rule gives {kind}, no tuple of a cotangent for each of {needed}"
            faults.append(("", message))
            given = tuple(cotangents) if isinstance(cotangents, tuple | list) else (cotangents,)
            cotangents = (*given, *[None] * len(arguments))[: len(arguments)]
        found: Leaves = []
        structure: Any
        for name, argument, cotangent in zip(self.names, arguments, cotangents, strict=True):
            primals, structure = jax.tree.flatten(argument)
            try:
                tree = [None] * len(primals)
                found += tree if cotangent is None else structure.flatten_up_to(cotangent)
            except (TypeError, ValueError, KeyError):
                faults.append(
                    (
                        name,
                        "its cotangent is a tree of another structure: it must be of "
                        f"{_described(argument)}, and is of {_described(cotangent)}",
                    )
                )
                found += [None] * len(primals)
        for place in self._arrays:
            primal, leaf = leaves[place], found[place]
            if leaf is None or getattr(leaf, "dtype", None) == jax.dtypes.float0:
                continue
            if not is_array(leaf) and not isinstance(leaf, int | float):
                faults.append((paths[place], f"its cotangent is a {type(leaf).__name__}, no array"))
                found[place] = None
                continue
            shape = jnp.shape(leaf)
            if not is_floating(primal):
                faults.append((paths[place], f"it is {primal.dtype} and has a cotangent"))
            elif shape != primal.shape:
                faults.append(
                    (paths[place], f"its cotangent has shape {shape}, not its own {primal.shape}")
                )
        for path, primal, leaf in self._floating(arguments, found):
            if leaf is not None and jnp.result_type(leaf) != primal.dtype:
                dtype = jnp.result_type(leaf)
                if dtype != jax.dtypes.float0:
                    faults.append((path, f"given {primal.dtype}, its cotangent is {dtype}"))
        arrays = [found[place] for place in self._arrays]
        return [leaf if leaf is None else jnp.asarray(leaf) for leaf in arrays], faults

    def _floating(self, arguments: PyTree, found: Leaves) -> list[tuple[str, Any, Any]]:
        leaves = jax.tree.leaves(arguments)
        return [(self._flat[0][place], leaves[place], found[place]) for place in self._places]


def is_inside(path: str, tree: str) -> bool:
    """Whether a leaf is this one, or in the tree of that path."""
    return path == tree or path.startswith(f"{tree}/")


def _described(tree: PyTree) -> str:
    """A tree as its paths and shapes."""
    leaves = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {jnp.shape(leaf)}".strip()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if is_array(leaf)
    ]
    return ", ".join(leaves[:12]) + (", ..." if len(leaves) > 12 else "") or "nothing"


def pulled(function: Callable[[Leaves], Leaves], own: Leaves, dy: Leaves) -> tuple[Leaves, Leaves]:
    """The value of a function of leaves, and what JAX pulls an error of it back to."""
    y, pull = jax.vjp(function, own)
    return y, pull([error.astype(leaf.dtype) for error, leaf in zip(dy, y, strict=True)])[0]


def floating_leaves(tree: PyTree) -> Leaves:
    """The floating-point leaves of an output."""
    return [leaf for leaf in map(jnp.asarray, jax.tree.leaves(tree)) if is_floating(leaf)]
