"""A number for each example that layers give beside their output, added up along a stack."""

from typing import Any

from jax import Array

from backhand.combinators.common import add_errors, around
from backhand.protocol import Layer, Static
from backhand.visit import Collect, Params, PyTree, Residuals, gradients


def tally(inner: Layer) -> Layer:
    """The same layer of x alone, beside which a sum is carried: (x, sum) to (y, sum + own).

    `own` is what the layer gives beside y, as a mixture of experts gives its balance; nothing, for
    a layer that gives y alone, and then the sum is passed on. An x without a sum is where the sum
    begins. Backward, the error of the sum is handed both to `own` and on.

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> experts = bh.chain(bh.layer_norm(), bh.mixture_of_experts(4, 16))
        >>> model = bh.chain(bh.skip(experts), tally(bh.skip(experts)), tally(bh.dense(10)))
        >>> x = jnp.ones((2, 8, 4))
        >>> y, balance = model(model.init(jax.random.key(0), x), x)
        >>> y.shape, balance.shape
        ((2, 8, 10), (2,))
    """

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        return inner.init(key, _parts(x)[0], **side)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        x, before = _parts(x)
        y, residuals = inner.forward(params, x, **side)
        y, own = _parts(y)
        pairs = Static((before is not None, own is not None))
        after = add_errors(before, own)
        return y if after is None else (y, after), (residuals, pairs)

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        residuals, (before, own) = residuals[0], residuals[1].value
        dy, dsum = _parts(dy)
        error = (dy, dsum) if own else dy
        collected, dx = inner.backward(params, residuals, error, collect, **side)
        return collected, (dx, dsum) if before else dx

    return around("tally", inner, forward, backward, init)


def _parts(x: PyTree) -> tuple[PyTree, PyTree]:
    """An array and the sum beside it, None where there is none.

    Raises:
        ValueError: for a tuple that is not a pair.
    """
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2:
        raise ValueError(f"tally needs x, or the pair (x, sum), got a tuple of {len(x)}")
    return x
