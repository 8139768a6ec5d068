"""A residual stack that stores no activations: its inputs are rebuilt on the way back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import upcast, whole_number
from backhand.combinators.common import (
    add_errors,
    keys_of,
    located,
    parts_of,
    same_shape,
    side_of,
    uses_of,
    with_key,
)
from backhand.protocol import Layer, Static, need_floating, output_shape
from backhand.visit import Collect, Params, PyTree, Residuals, gradients

Halves = tuple[Array, Array]


def reversible(f: Layer, g: Layer, depth: int) -> Layer:
    """Residual branches on two halves of the features in turn, rebuilt on the way back.

    With x1, x2 the halves of the last axis, a step and its inverse are

        y1 = x1 + f(x2)        x2 = y2 - g(y1)
        y2 = x2 + g(y1)        x1 = y1 - f(x2)

    so that the output alone is saved, whatever the depth. On the way back a step runs each branch
    forward once more, for its residuals and for the half to rebuild, and then in reverse:

        dx1 = dy1 + dg(dy2)    dx2 = dy2 + df(dx1)

    That is the time of a checkpointed stack, without its one saved activation a layer. Dropout in a
    branch draws the same mask both times. What a branch computes must not depend on anything but
    its arguments.

    Rebuilding rounds. The halves are carried in at least float32 from first to last step, and cast
    to the dtype of x where a branch reads them. Of blocks of normalization and MLP in bfloat16, the
    gradient is off from the float64 truth by 0.9, 1.0 and 1.2% at depth 8, 16 and 32, where storing
    everything gives 0.9, 1.1 and 1.3%; carried in bfloat16 it would drift to 1.8, 3.4 and 6.7%. In
    float32 it is off by 0.9e-6, 1.4e-6 and 2.4e-6, where storing gives 0.6e-6, 0.8e-6 and 0.9e-6.
    `drift` in tests/combinators/test_reversible.py measures it.

    Subtraction magnifies rounding by as much as a branch's output is larger than the half that it
    is added to: around a gated MLP whose outputs are 200 times its inputs, the float32 gradient of
    x is off by 6e-5 at depth 3, where storing gives 5e-7. Keep branches normalized or bounded, and
    x of their scale: an embedding begins with numbers of about 0.02, where normalized branches add
    numbers of about 1. A norm after it, or its `initializer` of deviation 1, mends that.

    Parameters: "f" and "g", each those of its layer stacked on a leading axis, as in `repeat`.

    Args:
        f: a layer from (..., D / 2) to the same shape and dtype.
        g: another one.
        depth: how many times, each with parameters of its own.

    Raises:
        ValueError: if depth < 1; when run, for an odd number of features, or a branch that changes
            the shape or dtype of its input.
        TypeError: for something that is not a layer; when run, if x is not one floating-point
            array.

    Example:
        >>> import backhand as bh
        >>> layer = reversible(bh.chain(bh.layer_norm(), bh.mlp(16)), bh.mlp(16), depth=6)
        >>> x = jnp.ones((2, 5, 8))
        >>> params = layer.init(jax.random.key(0), x)
        >>> y, residuals = layer.forward(params, x)
        >>> [leaf.shape for leaf in jax.tree.leaves(residuals)]
        [(2, 5, 4), (2, 5, 4)]

    References:
        Gomez, Ren, Urtasun and Grosse, "The reversible residual network", 2017.
    """
    parts = parts_of("reversible", (), {"f": f, "g": g})
    if whole_number("reversible's depth", depth) < 1:
        raise ValueError(f"reversible needs a depth of at least 1, got {depth}")

    def branch(index: int, params: Params, half: Array, side: Mapping[str, Any]) -> Any:
        """The output and the residuals of f or of g."""
        name, part = list(parts.items())[index]
        with located("reversible", name):
            y, residuals = part.forward(params[name], half, **side_of(part, side, index))
            same_shape(f"reversible: the output of {name}", y, "its input", half)
        return upcast(y), residuals

    def back(
        index: int, params: Params, residuals: Residuals, dy: Array, collect: Collect, side: Any
    ) -> tuple[PyTree, Array | None]:
        name, part = list(parts.items())[index]
        own = side_of(part, side, index)
        collected, dx = part.backward(params[name], residuals, dy, collect, **own)
        return collected, None if dx is None else upcast(dx)

    def init(key: Array, x: Any, **side: Any) -> Params:
        half = _half(x)

        def one(key: Array) -> Params:
            return {
                name: part.init(jax.random.fold_in(key, i), half, **side_of(part, side, i))
                for i, (name, part) in enumerate(parts.items())
            }

        params = jax.vmap(one)(jax.random.split(key, depth))
        for i, (name, part) in enumerate(parts.items()):
            own = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params[name])
            y = output_shape(part, own, half, **side_of(part, side, i))
            same_shape(f"reversible: the output of {name}", y, "its input", half)
        return params

    def forward(params: Params, x: Array, **side: Any) -> tuple[Array, Residuals]:
        _half(x)
        keys, dtype = keys_of(side, depth), x.dtype

        def step(halves: Halves, own: tuple[Params, Array | None]) -> tuple[Halves, None]:
            (x1, x2), (params, key) = halves, own
            side_ = with_key(side, key)
            y1 = x1 + branch(0, params, x2.astype(dtype), side_)[0]
            y2 = x2 + branch(1, params, y1.astype(dtype), side_)[0]
            return (y1, y2), None

        halves, _ = lax.scan(step, _split(upcast(x)), (params, keys), length=depth)
        return _join(halves).astype(dtype), (halves, Static(dtype))

    def backward(
        params: Params,
        residuals: Residuals,
        dy: Array | None,
        collect: Collect = gradients,
        **side: Any,
    ) -> tuple[PyTree, Array]:
        halves, dtype = residuals[0], residuals[1].value
        keys = keys_of(side, depth)
        error = jax.tree.map(jnp.zeros_like, halves) if dy is None else _split(upcast(dy))

        def step(carry: tuple[Halves, Halves], own: Any) -> tuple[tuple[Halves, Halves], PyTree]:
            ((y1, y2), (dy1, dy2)), (params, key) = carry, own
            side_ = with_key(side, key)
            z, saved = branch(1, params, y1.astype(dtype), side_)
            of_g, error = back(1, params, saved, dy2.astype(dtype), collect, side_)
            x2, dx1 = y2 - z, add_errors(dy1, error)
            z, saved = branch(0, params, x2.astype(dtype), side_)
            of_f, error = back(0, params, saved, dx1.astype(dtype), collect, side_)
            x1, dx2 = y1 - z, add_errors(dy2, error)
            return ((x1, x2), (dx1, dx2)), {"f": of_f, "g": of_g}

        start, each = (halves, error), (params, keys)
        (_, dx), collected = lax.scan(step, start, each, length=depth, reverse=True)
        return collected, _join(dx).astype(dtype)

    return Layer("reversible", init, forward, backward, uses_of(parts), parts)


def _half(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of half of x.

    Raises:
        TypeError: if x is not one floating-point array.
        ValueError: if its features cannot be halved.
    """
    need_floating("reversible", x)
    if not x.shape or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"reversible needs an even number of features to halve, got x of shape {x.shape}"
        )
    return jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // 2), x.dtype)


def _split(x: Array) -> Halves:
    """The halves of the last axis."""
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def _join(halves: Halves) -> Array:
    return jnp.concatenate(halves, -1)
