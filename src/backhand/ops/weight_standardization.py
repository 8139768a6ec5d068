"""Weight standardization: each output's weights brought to mean 0 and variance 1.

For the n weights w of one output (all axes but the last), with mean m, variance v and
r = 1 / sqrt(v + eps):

    h = (w - m) r

which is normalization without scale and offset, so its error loses its mean and its part along h:

    dw = r (dh - mean(dh) - h mean(dh h))

The loss then changes with the weights' direction alone, smoothly. All of it runs in at least
float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import like_primal, upcast
from backhand.ops.averages import over_batch
from backhand.protocol import Op, need_floating


class Residuals(NamedTuple):
    """The weights, and the statistics of each output."""

    w: Float[Array, "*inputs O"]
    mean: Float[Array, "*ones O"]
    rstd: Float[Array, "*ones O"]


def weight_standardization_forward(
    w: Float[Array, "*inputs O"], *, eps: float = 1e-5
) -> tuple[Float[Array, "*inputs O"], Residuals]:
    """The weights of each output, standardized.

    Args:
        w: weights (I, O), or (*kernel, I, O) of a convolution.
        eps: added to the variance.

    Raises:
        TypeError: if w is not floating point.
        ValueError: if w has fewer than two axes.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.weight_standardization(jnp.array([[1.0], [3.0]]), eps=0.0).ravel().tolist()
        [-1.0, 1.0]

    References:
        Qiao et al., "Micro-batch training with batch-channel normalization and weight
        standardization", 2019.
    """
    need_floating("weight_standardization", w)
    if w.ndim < 2:
        raise ValueError(
            f"weight_standardization needs w of shape (I, O) or (*kernel, I, O), got {w.shape}"
        )
    average, wide = over_batch(w), upcast(w)
    mean = average(wide)
    rstd = 1 / jnp.sqrt(average(jnp.square(wide + -mean)) + eps)
    return ((wide - mean) * rstd).astype(w.dtype), Residuals(w, mean, rstd)


def weight_standardization_backward(
    residuals: Residuals, dh: Float[Array, "*inputs O"], *, eps: float = 1e-5
) -> Float[Array, "*inputs O"]:
    average, wide = over_batch(dh), upcast(dh)
    h = (upcast(residuals.w) - residuals.mean) * residuals.rstd
    dw = residuals.rstd * (wide - (average(wide) + h * average(wide * h)))
    return like_primal(dw, residuals.w)


def weight_standardization_reference(w: Array, *, eps: float = 1e-5) -> Array:
    wide, axes = upcast(w), tuple(range(w.ndim - 1))
    mean, var = jnp.mean(wide, axes, keepdims=True), jnp.var(wide, axes, keepdims=True)
    return ((wide - mean) / jnp.sqrt(var + eps)).astype(w.dtype)


weight_standardization = Op(
    "weight_standardization",
    weight_standardization_forward,
    weight_standardization_backward,
    weight_standardization_reference,
)
