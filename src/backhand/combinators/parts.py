"""Inputs of several parts, such as tokens and a context: a layer on one of them, or one alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import is_floating
from backhand.combinators.common import around, part_of, with_part
from backhand.protocol import Layer, layer
from backhand.visit import Collect, Params, PyTree, Residuals, gradients


def on(part: str | int, inner: Layer) -> Layer:
    """The layer applied to one part of its input: {**x, part: f(x[part])}; others are passed on.

    Of a dict by name, or of a tuple by place. Backward, the part's error goes through f, and those
    of the others are passed back. Parameters are those of `inner`.

    With `skip(..., on=part)` and attention, which reads a dict of `x` and `context`, blocks of two
    inputs are written so. Under `repeat` the context, which no block changes, is stored once.

    Args:
        part: its name or place.
        inner: what is applied to it.

    Raises:
        TypeError: when run, for an input that is neither a dict nor a tuple.
        ValueError: when run, for one without that part.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> block = bh.chain(
        ...     bh.skip(bh.chain(on("x", bh.rms_norm()), bh.multi_head_attention(2)), on="x"),
        ...     on("x", bh.skip(bh.chain(bh.rms_norm(), bh.mlp(16)))),
        ... )
        >>> x = {"x": jnp.ones((2, 3, 4)), "context": jnp.ones((2, 7, 6))}
        >>> y = block(block.init(jax.random.key(0), x), x)
        >>> y["x"].shape, y["context"].shape
        ((2, 3, 4), (2, 7, 6))
    """

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        return inner.init(key, part_of("on", x, part), **side)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        y, residuals = inner.forward(params, part_of("on", x, part), **side)
        return with_part(x, part, y), residuals

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        own = None if dy is None else dy[part]
        collected, dx = inner.backward(params, residuals, own, collect, **side)
        return collected, None if dy is None else with_part(dy, part, dx)

    return around("on", inner, forward, backward, init)


def pick(part: str | int) -> Layer:
    """One part of an input, alone: x[part]. The errors of the others are zero.

    Args:
        part: the name of a dict's, or the place of a tuple's.

    Raises:
        TypeError: when run, for an input that is neither a dict nor a tuple.
        ValueError: when run, for one without that part.

    Example:
        >>> pick("x")((), {"x": 1.0, "context": 2.0}).item()
        1.0
    """

    def forward(params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        return part_of("pick", x, part), x

    def rule(params: Params, x: PyTree, dy: PyTree) -> tuple[Params, PyTree]:
        return params, with_part(jax.tree.map(_nothing, x), part, dy)

    return layer("pick", lambda key, x: (), forward, rule)


def _nothing(x: Array) -> Array | None:
    """An error of zero, split over devices as x is; None where x has none."""
    return jnp.where(False, x, 0) if is_floating(x) else None
