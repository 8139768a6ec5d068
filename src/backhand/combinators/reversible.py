"""A residual stack that stores no activations: its inputs are rebuilt on the way back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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

Errors = tuple[Array, Array]


class Exact(NamedTuple):
    """An array near + rest, of nearly twice the digits of its dtype."""

    near: Array
    rest: Array


Halves = tuple[Exact, Exact]


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

    Rebuilding does not drift. Each half is carried, from first to last step, in at least float32
    and beside it what rounding took from it, so that a sum can be taken back to 48 bits; it is cast
    to the dtype of x where a branch reads it. What is saved is the output twice over; both ways
    together take up to 1.2 of the time of plain subtraction. Of blocks of
    normalization and MLP the gradient is off from the float64 truth by 2.5e-7, 3.1e-7, 4.1e-7 and
    5.5e-7 in float32 at depth 8, 16, 32 and 128, where storing everything gives 2.5e-7, 3.4e-7,
    4.1e-7 and 7.0e-7, and plain subtraction 4.0e-7, 8.1e-7, 2.0e-6 and 1.0e-5. In bfloat16 it is
    off by 1.0, 1.2, 1.5 and 2.2%, where storing gives 1.0, 1.3, 1.7 and 2.2%. `drift` in
    tests/combinators/test_reversible.py measures it. A branch may let a half grow: of gated MLPs
    whose outputs are 4,000 times their inputs the gradient is off by 2e-6, not by 5e-3. From about
    a million times on what is taken away is larger than the digits that are kept, and the gradient
    is lost: at 1e8 it is off by 3e-5, at 5e9 by a tenth. Keep branches normalized or bounded.

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
        >>> {leaf.shape for leaf in jax.tree.leaves(residuals)}  # of two halves, and their rest
        {(2, 5, 4)}

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
            y1 = _plus(x1, branch(0, params, x2.near.astype(dtype), side_)[0])
            y2 = _plus(x2, branch(1, params, y1.near.astype(dtype), side_)[0])
            return (y1, y2), None

        x1, x2 = (Exact(half, jnp.zeros_like(half)) for half in _split(upcast(x)))
        halves, _ = lax.scan(step, (x1, x2), (params, keys), length=depth)
        return _join([half.near for half in halves]).astype(dtype), (halves, Static(dtype))

    def backward(
        params: Params,
        residuals: Residuals,
        dy: Array | None,
        collect: Collect = gradients,
        **side: Any,
    ) -> tuple[PyTree, Array]:
        halves, dtype = residuals[0], residuals[1].value
        keys = keys_of(side, depth)
        zero = jnp.zeros_like(halves[0].near)
        error = (zero, zero) if dy is None else _split(upcast(dy))

        def step(carry: tuple[Halves, Errors], own: Any) -> tuple[tuple[Halves, Errors], PyTree]:
            ((y1, y2), (dy1, dy2)), (params, key) = carry, own
            side_ = with_key(side, key)
            z, saved = branch(1, params, y1.near.astype(dtype), side_)
            of_g, error = back(1, params, saved, dy2.astype(dtype), collect, side_)
            x2, dx1 = _plus(y2, -z), add_errors(dy1, error)
            z, saved = branch(0, params, x2.near.astype(dtype), side_)
            of_f, error = back(0, params, saved, dx1.astype(dtype), collect, side_)
            x1, dx2 = _plus(y1, -z), add_errors(dy2, error)
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


def _plus(half: Exact, z: Array) -> Exact:
    """half + z, by Knuth's sum of two numbers and its error; infinity has no rest."""
    near = half.near + z
    part = near - half.near
    rest = (half.near - (near - part)) + (z - part) + half.rest
    total, finite = near + rest, jnp.isfinite(near)
    return Exact(jnp.where(finite, total, near), jnp.where(finite, rest - (total - near), 0))


def _split(x: Array) -> Errors:
    """The halves of the last axis."""
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def _join(halves: Sequence[Array]) -> Array:
    return jnp.concatenate(halves, -1)
