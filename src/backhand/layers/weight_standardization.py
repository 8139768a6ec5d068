"""A layer whose weight is standardized before it is used."""

import jax
from jax import Array

from backhand import ops
from backhand.contributions import total
from backhand.protocol import Layer, layer
from backhand.visit import Params, PyTree, contributions


def standardized(inner: Layer, *, eps: float = 1e-5) -> Layer:
    """`inner`, each output's weights brought to mean 0 and variance 1 at every use.

    Before group normalization in a convolutional network this does what batch normalization does,
    at any size of batch. The parameters are those of `inner`, its weight as it is learned. The
    derivation is with `backhand.ops.weight_standardization`.

    Args:
        inner: a layer with a weight `w` (..., O) and without side inputs: dense, or a convolution.
        eps: added to the variance.

    Raises:
        ValueError: if `inner` has side inputs; when initialised, if it has no weight `w`.

    Example:
        >>> import backhand as bh, jax
        >>> layer = bh.layers.standardized(bh.dense(4))
        >>> sorted(layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 8), "float32")))
        ['b', 'w']
    """
    op = ops.weight_standardization.bind(eps=eps)
    if inner.uses:
        raise ValueError(
            f"standardized needs a layer without side inputs, got {inner.name}, which uses "
            f"{', '.join(sorted(inner.uses))}"
        )

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        params = inner.init(key, x)
        if not isinstance(params, dict) or not isinstance(params.get("w"), Array):
            raise ValueError(
                f"standardized needs a layer with one weight 'w', as dense has; got {inner!r}"
            )
        return params

    def forward(params: Params, x: PyTree) -> tuple[PyTree, PyTree]:
        own = {**params, "w": op.forward(params["w"])[0]}
        return inner.forward(own, x)

    def rule(params: Params, residuals: PyTree, dy: PyTree) -> tuple[PyTree, PyTree]:
        w, saved = op.forward(params["w"])
        given, dx = inner.backward({**params, "w": w}, residuals, dy, contributions)
        return {**given, "w": op.backward(saved, total(given["w"], w))}, dx

    return layer(f"standardized {inner.name}", init, forward, rule)
