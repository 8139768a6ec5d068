"""A row of the catalogue: one use of an op, a loss or a layer, as data.

Kinds of values, shapes by the names of their axes, and settings; `Row.arguments` turns them into
arrays of any dtype and size.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from backhand.arrays import accumulation_dtype
from backhand.contributions import Running, is_running
from backhand.protocol import Layer, Op
from backhand.visit import PyTree, Residuals

SIZES = {
    **{"B": 4, "T": 3, "D": 8, "I": 8, "O": 4, "V": 12},
    **{"H": 4, "K": 2, "S": 5, "U": 4, "3U": 12, "4U": 16},
}
"""The length of each axis, unless told otherwise; all but K, S and T divide over four
devices."""

KINDS: dict[str, Callable[..., np.ndarray]] = {
    "normal": lambda rng, shape, below: rng.normal(size=shape),
    "positive": lambda rng, shape, below: rng.uniform(0.5, 1.5, shape),
    "shares": lambda rng, shape, below: rng.uniform(0, 1, shape),
    "probabilities": lambda rng, shape, below: rng.dirichlet(np.ones(shape[-1]), shape[:-1]),
    "weights": lambda rng, shape, below: rng.choice([0.0, 0.5, 2.0], shape),
    "ids": lambda rng, shape, below: rng.integers(0, below, shape, np.int32),
    "mask": lambda rng, shape, below: rng.choice([False, True], shape),
    "key": lambda rng, shape, below: rng.integers(0, 1000, shape),
}
"""What the values of an array are, by name."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One array argument.

    Attributes:
        kind: what its values are, one of `KINDS`.
        axes: its axes by name, "B T D"; a number stands for itself.
        below: the axis whose length integers stay below.
        wide: whether it stays in at least float32, as parameters do.
    """

    kind: str
    axes: str = ""
    below: str = "1"
    wide: bool = False

    def array(self, dtype: DTypeLike, rng: np.random.Generator, sizes: Mapping[str, int]) -> Array:
        """Random values; what is floating point in `dtype`."""
        size = {axis: sizes[axis] if axis in sizes else int(axis) for axis in self._names()}
        shape = tuple(size[axis] for axis in self.axes.split())
        values = KINDS[self.kind](rng, shape, size[self.below])
        if self.kind == "key":
            return jax.random.key(int(values))
        if not np.issubdtype(values.dtype, np.floating):
            return jnp.asarray(values)
        return jnp.asarray(values, accumulation_dtype(dtype) if self.wide else dtype)

    def _names(self) -> list[str]:
        return [*self.axes.split(), self.below]


SpecTree: TypeAlias = Any


def make(specs: SpecTree, dtype: DTypeLike = jnp.float32, seed: int = 0, **sizes: int) -> PyTree:
    """A tree of specs as arrays.

    Args:
        specs: a tree of `Spec`; None is no array.
        dtype: of what is floating point and not wide.
        seed: another seed gives other values.
        sizes: lengths of axes, where they are not those of `SIZES`.

    Example:
        >>> make({"x": Spec("normal", "B D"), "ids": Spec("ids", "B", "V")}, B=2)["x"].shape
        (2, 8)
    """
    structure: Any
    leaves, structure = jax.tree.flatten(specs)
    known = {**SIZES, **sizes}
    return structure.unflatten(
        [
            spec.array(dtype, np.random.default_rng((seed, index)), known)
            for index, spec in enumerate(leaves)
        ]
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One use of an op, a loss or a layer, as functions of the arrays it is differentiated in.

    The arguments of an op are its arrays. Those of a layer are `(params, x, side)`, with the side
    inputs that are arrays, which have no cotangent.

    Attributes:
        name: its public name, "ops.linear".
        subject: the op, or the function that makes the layer.
        inputs: the op's arrays; a layer's x alone.
        settings: static arguments of the op; arguments of the function that makes the layer.
        side: side inputs of a layer, each a spec or a plain value.
        textbook: `(params, x, **side) -> y`; by default the layer's own forward.
        edges: borders of what it takes, each as axes of another length.
        without: what cannot apply to it, and why.
    """

    name: str
    subject: Callable[..., Any]
    inputs: tuple[SpecTree, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    side: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    textbook: Callable[..., PyTree] | None = None
    edges: tuple[Mapping[str, int], ...] = ({"B": 1}, {"D": 1, "I": 1}, {"B": 0})
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """What tells it from other rows: losses.huber(weights, delta=0.5)."""
        kinds = [spec.kind for spec in jax.tree.leaves(self.inputs) if spec.kind != "normal"]
        given = {k: getattr(v, "name", v) for k, v in {**self.settings, **self.plain}.items()}
        return f"{self.name}({', '.join([*kinds, *(f'{k}={v!r}' for k, v in given.items())])})"

    @functools.cached_property
    def function(self) -> Op | Layer:
        """The op with its settings, or the layer."""
        if isinstance(self.subject, Op):
            return self.subject.bind(**self.settings)
        made: Layer = self.subject(**self.settings)
        return made

    def arguments(
        self, dtype: DTypeLike = jnp.float32, seed: int = 0, **sizes: int
    ) -> tuple[PyTree, ...]:
        """Its arguments as arrays, parameters random too.

        Args:
            dtype: of activations; parameters have at least float32.
            seed: another seed gives other values.
            sizes: lengths of axes, where they are not those of `SIZES`.
        """
        function = self.function
        if isinstance(function, Op):
            return tuple(make(self.inputs, dtype, seed, **sizes))
        side = {name: value for name, value in self.side.items() if name not in self.plain}
        x, side = make((*self.inputs, side), dtype, seed, **sizes)
        shapes = {name: value for name, value in side.items() if name != "key"}
        params = jax.eval_shape(
            lambda x, shapes: function.init(jax.random.key(0), x, **shapes), x, shapes
        )
        specs = jax.tree.map(_of_parameter, params, is_leaf=is_running)
        return make(specs, dtype, seed + 1), x, side

    def forward(self, *arguments: PyTree) -> tuple[PyTree, Residuals]:
        """`(y, residuals)`."""
        if isinstance(self.function, Op):
            return self.function.forward(*arguments)
        params, x, side = arguments
        return self.function.forward(params, x, **side, **self.plain)

    def backward(
        self, arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree
    ) -> tuple[PyTree, ...]:
        """One cotangent per argument, None where there is none."""
        if isinstance(self.function, Op):
            return self.function.cotangents(residuals, dy)
        params, _, side = arguments
        dparams, dx = self.function.backward(params, residuals, dy, **side, **self.plain)
        return dparams, dx, None

    def reference(self, *arguments: PyTree) -> PyTree:
        """The output y in its textbook form, for `jax.grad` to differentiate."""
        if isinstance(self.function, Op):
            return self.function.reference(*arguments)
        params, x, side = arguments
        return (self.textbook or self.function)(params, x, **side, **self.plain)

    @property
    def plain(self) -> dict[str, Any]:
        """The side inputs that are not arrays."""
        return {name: value for name, value in self.side.items() if not isinstance(value, Spec)}


def _of_parameter(shape: Any) -> Any:
    """The spec of a parameter, from its shape; variances are positive."""
    if isinstance(shape, Running):
        mean, var = (_of_parameter(leaf) for leaf in (shape.mean, shape.var))
        return Running(mean, dataclasses.replace(var, kind="positive"), shape.decay)
    return Spec("normal", " ".join(map(str, shape.shape)), wide=True)
