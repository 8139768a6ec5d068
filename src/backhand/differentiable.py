"""A layer as a plain JAX function, for models that are written with another library."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from backhand.protocol import Layer, split_side
from backhand.visit import Params, PyTree


def differentiable(layer: Layer) -> Callable[..., PyTree]:
    """A layer as a function whose `jax.grad` runs the hand-written reverse.

    Returns:
        `(params, x, **side) -> y`. Side inputs are not differentiated.

    Example:
        >>> import backhand as bh
        >>> model = bh.chain(bh.dense(4), bh.tanh())
        >>> x = jnp.ones((2, 3))
        >>> params = model.init(jax.random.key(0), x)
        >>> f = bh.differentiable(model)
        >>> jax.grad(lambda x: f(params, x).sum())(x).shape
        (2, 3)
    """

    def function(params: Params, x: PyTree, **side: Any) -> PyTree:
        arrays, settings = split_side(side)

        def forward(params: Params, x: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
            y, residuals = layer.forward(params, x, **arrays, **settings)
            return y, (params, residuals, arrays)

        def backward(saved: PyTree, dy: PyTree) -> tuple[PyTree, PyTree, None]:
            params, residuals, arrays = saved
            dparams, dx = layer.backward(params, residuals, dy, **arrays, **settings)
            return dparams, dx, None

        call = jax.custom_vjp(lambda *args: forward(*args)[0])
        call.defvjp(forward, backward)
        return call(*jax.tree.map(jnp.asarray, (params, x)), arrays)

    return function
