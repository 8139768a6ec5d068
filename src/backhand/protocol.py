"""The contract: ops, layers, and what a reverse pass visits.

An `Op` is a function of arrays with a hand-written backward. A `Layer` is an op with parameters, or
layers composed. Both are plain records of pure functions: `forward` gives an output and the
residuals that `backward` needs; `backward` turns the error of the output (its cotangent, the blame)
into the error of the input.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import is_floating, need_array
from backhand.contributions import map_owners
from backhand.visit import Collect, Params, PyTree, Residuals, Rule, Visit, gradients

OpType = TypeVar("OpType", bound="Op")
Training: TypeAlias = Literal["frozen"] | bool
"""The side input `training`: "frozen" is true, where the parameters stay as they are (`freeze`)."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value among residuals: part of the tree's structure, so that scan leaves it be."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """A function of arrays with a hand-written backward.

    Calling it gives a function that `jax.grad` differentiates by `backward`. Inside a `forward`, a
    `backward` or a layer use `op.forward` and `op.backward` instead: through the call, both sides
    of a comparison would run the hand-written rule.

    Args:
        name: what errors and reports call it.
        forward: `(*arrays, **static) -> (y, residuals)`.
        backward: `(residuals, dy, **static)` -> one cotangent per array argument (a single one may
            stand alone), None where there is none: integers, booleans, keys.
        reference: `(*arrays, **static) -> y`, the plain textbook form that the backward is audited
            against.

    Example:
        >>> square = Op("square", lambda x: (x * x, x), lambda x, dy: 2 * x * dy, jax.numpy.square)
        >>> float(jax.grad(square)(3.0))
        6.0
    """

    name: str
    forward: Callable[..., tuple[PyTree, Residuals]]
    backward: Callable[..., PyTree]
    reference: Callable[..., PyTree]

    def __post_init__(self) -> None:
        """Documents the op by its forward."""
        object.__setattr__(self, "__doc__", self.forward.__doc__)

    def __repr__(self) -> str:
        """The kind and the name: Op('relu')."""
        return f"{type(self).__name__}({self.name!r})"

    def __call__(self, *arrays: PyTree, **static: Any) -> PyTree:
        """The output y, differentiable (in reverse) by the hand-written backward."""
        self._known(static)
        if not static.keys() <= self._settings():  # an array given by name takes its place
            bound = inspect.signature(self.forward).bind(*arrays, **static)
            bound.apply_defaults()
            arrays, static = bound.args, bound.kwargs
        function = jax.custom_vjp(lambda *arrays: self.forward(*arrays, **static)[0])
        function.defvjp(
            lambda *arrays: self.forward(*arrays, **static),
            # An optional array that was left out has no cotangent to give.
            lambda residuals, dy: self.cotangents(residuals, dy, **static)[: len(arrays)],
        )
        return function(*jax.tree.map(jnp.asarray, arrays))

    def cotangents(self, residuals: Residuals, dy: PyTree, **static: Any) -> tuple[PyTree, ...]:
        """`backward`, always as a tuple with one cotangent per array argument."""
        result = self.backward(residuals, dy, **static)
        return result if type(result) is tuple else (result,)

    def bind(self: OpType, **static: Any) -> OpType:
        """The op with some of its static arguments fixed.

        Raises:
            TypeError: if the op has no such argument, or it is an array.

        Example:
            >>> import backhand as bh
            >>> loss = bh.losses.softmax_cross_entropy.bind(label_smoothing=0.1)
        """
        self._known(static)
        for name in static.keys() - self._settings():
            raise TypeError(f"{self.name}: {name!r} is an array, given with each call, not bound")
        functions = ("forward", "backward", "reference")
        bound: dict[str, Any] = {
            name: functools.partial(getattr(self, name), **static) for name in functions
        }
        return dataclasses.replace(self, **bound)

    def _settings(self) -> set[str]:
        """The names of the static arguments; the others are arrays."""
        parameters = inspect.signature(self.forward).parameters.values()
        return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)}

    def _known(self, static: Mapping[str, Any]) -> None:
        known = inspect.signature(self.forward).parameters
        for name in static.keys() - known.keys():
            raise TypeError(f"{self.name} has no argument {name!r}{suggestion(name, known)}")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Loss(Op):
    """An op of (predictions, targets, weights=None) that gives a sum and a weight, never a mean.

    y = (total, weight), each a scalar or a tree of one per term; the weight is a function of the
    batch alone. Divided once, at the end, by the weight of everything that was summed, the loss and
    its gradient are exact over masked and ragged batches, however they were split.

    Args:
        check: `(predictions, targets, weights) -> None`, run on the host before anything compiles;
            predictions are a `jax.ShapeDtypeStruct`, the others as the user gave them; and what
            it names of the static arguments. Raises ValueError where the loss is not defined.
        has_targets: False where the loss is one of predictions alone, and its targets are None.
    """

    check: Callable[..., None] = lambda predictions, targets, weights: None
    has_targets: bool = True

    def bind(self, **static: Any) -> "Loss":
        """What `Op.bind` gives, with `check` bound as well."""
        known = inspect.signature(self.check).parameters
        own = functools.partial(self.check, **{k: v for k, v in static.items() if k in known})
        return dataclasses.replace(super().bind(**static), check=own)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A function of parameters and an input with a hand-written backward.

    Args:
        name: what errors and reports call it.
        init: `(key, x, **side) -> params`, from the shape of x (a `jax.ShapeDtypeStruct`).
        forward: `(params, x, **side) -> (y, residuals)`.
        backward: `(params, residuals, dy, collect=gradients, **side) -> (collected, dx)`.
        uses: the names of its side inputs: what is handed to forward and again to backward, and is
            not differentiated (`key`, `training`, a mask).
        parts: the layers that it is composed of, in model order, by their keys in its parameters.
        inner: the one layer that it wraps, whose parameters are its own.
    """

    name: str
    init: Callable[..., Params]
    forward: Callable[..., tuple[PyTree, Residuals]]
    backward: Callable[..., tuple[PyTree, PyTree]]
    uses: frozenset[str] = frozenset()
    parts: Mapping[str | int, "Layer"] = dataclasses.field(default_factory=dict)
    inner: "Layer | None" = None

    def __call__(self, params: Params, x: PyTree, **side: Any) -> PyTree:
        """The output y."""
        self._known(side)
        return self.forward(params, jax.tree.map(jnp.asarray, x), **side)[0]

    def __repr__(self) -> str:
        """The layer's structure: chain(hidden=dense, act=relu)."""
        if self.inner is not None:
            return f"{self.name}({self.inner!r})"
        parts = ", ".join(
            f"{key}={part!r}" if isinstance(key, str) else repr(part)
            for key, part in self.parts.items()
        )
        return f"{self.name}({parts})" if self.parts else self.name

    def __post_init__(self) -> None:
        """Refuses unknown side inputs in every entry."""
        for entry in ("init", "forward", "backward"):
            object.__setattr__(self, entry, self._checked(entry))

    def _checked(self, entry: str) -> Callable[..., Any]:
        function = getattr(self, entry)

        @functools.wraps(function)
        def checked(*args: Any, **side: Any) -> Any:
            if entry == "init":
                args = (args[0], *(shapes_of(x) for x in args[1:]))
                if "training" in self.uses:
                    side.setdefault("training", False)
            self._known(side)
            return function(*args, **side)

        return checked

    def _known(self, side: Mapping[str, Any]) -> None:
        for name in side.keys() - self.uses - {"collect"}:
            raise TypeError(
                f"{self.name} has no side input {name!r}{suggestion(name, self.uses)}; it uses "
                f"{listed(self.uses)}"
            )


def layer(
    name: str,
    init: Callable[..., Params],
    forward: Callable[..., tuple[PyTree, Residuals]],
    rule: Rule,
) -> Layer:
    """A primitive layer, from its forward and the rule that reverses it.

    Side inputs are the keyword-only arguments of `forward`; the rule declares those that it needs.

    Args:
        name: what errors and reports call it.
        init: `(key, x) -> params`.
        forward: `(params, x, *, side inputs) -> (y, residuals)`.
        rule: `(params, residuals, dy, *, side inputs) -> (dparams, dx)`; dparams as the parameters
            are, each an array or a contribution (see `backhand.contributions`).

    Example:
        >>> scale = layer(
        ...     "scale",
        ...     init=lambda key, x: {"s": jax.numpy.ones(())},
        ...     forward=lambda params, x: (params["s"] * x, x),
        ...     rule=lambda params, x, dy: ({"s": (x * dy).sum()}, params["s"] * dy),
        ... )
        >>> float(scale({"s": 2.0}, 3.0))
        6.0
    """
    uses = _keyword_only(forward)
    required = {key for key, parameter in uses.items() if parameter.default is parameter.empty}
    in_rule = _keyword_only(rule).keys()
    if in_rule - uses.keys():
        raise TypeError(f"{name}: the rule uses {listed(in_rule - uses.keys())}, the forward not")

    def checked_forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        for missing in required - {key for key, value in side.items() if value is not None}:
            raise TypeError(f"{name} needs the side input {missing!r}: pass {missing}=...")
        result: Any = forward(params, x, **side)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"{name}: a forward gives a pair (y, residuals), got {type(result).__name__}; "
                "residuals are (x, ...), or () where backward needs none"
            )
        return result

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        def reverse(params: Params, residuals: Residuals, dy: PyTree) -> tuple[PyTree, PyTree]:
            if not jax.tree.leaves(dy):  # no blame comes in: none goes out
                return map_owners(lambda _: None, params), None
            result = rule(params, residuals, dy, **{k: side[k] for k in in_rule if k in side})
            _check_pair(name, params, result)
            return result

        visit = Visit(params, residuals, dy, reverse)
        return collect(visit) if jax.tree.leaves(params) else (params, visit.dx)

    return Layer(
        name, lambda key, x, **side: init(key, x), checked_forward, backward, frozenset(uses)
    )


def _check_pair(name: str, params: Params, result: Any) -> None:
    """Refuses what is not a rule's result.

    Raises:
        TypeError: saying what a rule gives.
    """
    expected = f"{name}: a rule gives a pair (cotangents like the parameters, dx)"
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{expected}, got {type(result).__name__}")
    try:
        map_owners(lambda *_: None, params, result[0])
    except (TypeError, ValueError):
        got = listed(result[0]) if isinstance(result[0], Mapping) else type(result[0]).__name__
        own = listed(params) if isinstance(params, Mapping) else type(params).__name__
        raise TypeError(f"{expected}; the parameters are {own}, the cotangents {got}") from None


def as_layer(op: Op, **static: Any) -> Layer:
    """A layer without parameters, from an op of one array."""

    def rule(params: Params, residuals: Residuals, dy: Array) -> tuple[Params, PyTree]:
        return params, op.cotangents(residuals, dy, **static)[0]

    return layer(op.name, lambda key, x: (), lambda params, x: op.forward(x, **static), rule)


def output_shape(layer: Layer, params: Params, x: PyTree, **side: Any) -> PyTree:
    """The shape and dtype of a layer's output, without running it.

    `params` and `x` may be arrays or `jax.ShapeDtypeStruct`s.
    """
    if "key" in layer.uses and "key" not in side:
        side["key"] = jax.eval_shape(lambda: jax.random.key(0))
    arrays, settings = split_side(side)
    return jax.eval_shape(
        lambda params, x, arrays: layer(params, x, **arrays, **settings), params, x, arrays
    )


def shapes_of(tree: PyTree) -> PyTree:
    """A tree of arrays as one of `jax.ShapeDtypeStruct`s."""

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))

    return jax.tree.map(shape_of, tree)


def split_side(side: Mapping[str, Any]) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Side inputs that are arrays, and those that are Python values, such as `training`."""
    settings = {n: v for n, v in side.items() if isinstance(v, bool | int | float | str | None)}
    return {name: side[name] for name in side.keys() - settings.keys()}, settings


def need_floating(name: str, x: Any, argument: str = "") -> None:
    """Refuses an input, or the argument of that name, that has no cotangent.

    Raises:
        TypeError: if x is not one array, or not floating point.
    """
    if argument:
        need_array(name, argument, x)
    elif isinstance(x, dict | tuple | list):
        parts = listed(x) if isinstance(x, dict) else f"{len(x)}"
        first = 0 if not isinstance(x, dict) or not x else "x" if "x" in x else min(x)
        raise TypeError(
            f"{name} needs one array, got a {type(x).__name__} of {parts}; apply it to one of them "
            f"with on({first!r}, ...), or go on with that alone by pick({first!r})"
        )
    if not is_floating(x):
        ids = "" if argument else ", or embed it if it holds ids"
        raise TypeError(
            f"{name} needs floating-point {argument or 'input'}, got {x.dtype} of shape {x.shape}; "
            f"convert it with {argument or 'x'}.astype(jnp.float32){ids}"
        )


def split_key(key: Array | None, index: int | Array) -> Array | None:
    """The key of the child at `index`, the same in forward and backward; None for None.

    Raises:
        TypeError: for a raw uint32 key.
    """
    if key is None:
        return None
    check_key(key)
    return jax.random.fold_in(key, index)


def check_key(key: Any) -> None:
    """Refuses what is not a typed key.

    Raises:
        TypeError: saying what it is.
    """
    dtype = getattr(key, "dtype", type(key).__name__)
    if not isinstance(key, Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be typed, made by jax.random.key(seed), got {dtype}")


def suggestion(name: str, known: Collection[str]) -> str:
    """'; did you mean ...?', where a known name is close to `name`."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Collection[str]) -> str:
    """Names for an error message, in order; 'none' for none."""
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def _keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
