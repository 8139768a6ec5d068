"""Normalization: x brought to mean 0 and variance 1, then scaled and shifted.

With mean m and variance v of x over n elements, r = 1 / sqrt(v + eps) and h = (x - m) r:

    y = h scale + offset

The error g = dy scale of h reaches x directly, and through m and through v, which every element of
the group takes part in. Their paths take out of g its mean and its part along h:

    dx = r (g - mean(g) - h mean(g h))
    dscale = sum(dy h)        doffset = sum(dy)

Layer normalization takes the group to be the features of one example; batch normalization one
feature of all examples. All of it runs in at least float32.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import last_axis, like_primal, upcast
from backhand.contributions import Total, total
from backhand.protocol import Op, need_floating


class Residuals(NamedTuple):
    """x and the statistics of its groups; the normalised h is computed again from them."""

    x: Float[Array, "... D"]
    mean: Float[Array, "..."]
    rstd: Float[Array, "..."]
    scale: Float[Array, " D"]
    offset: Float[Array, " D"]

    @property
    def h(self) -> Float[Array, "... D"]:
        """(x - mean) / std, in at least float32."""
        return (upcast(self.x) - self.mean) * self.rstd


def layer_norm_forward(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    offset: Float[Array, " D"],
    *,
    eps: float = 1e-5,
) -> tuple[Float[Array, "... D"], Residuals]:
    """Layer normalization over the last axis.

    Args:
        x: inputs (..., D).
        scale: (D,).
        offset: (D,).
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if scale or offset is not (D,).

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> y = bh.ops.layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2), eps=0.0)
        >>> y.tolist()
        [[-1.0, 1.0]]

    References:
        Ba, Kiros and Hinton, "Layer normalization", 2016.
    """
    return _normalize("layer_norm", x, scale, offset, (x.ndim - 1,), eps)


def batch_norm_forward(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    offset: Float[Array, " D"],
    *,
    eps: float = 1e-5,
) -> tuple[Float[Array, "... D"], Residuals]:
    """Batch normalization, as in training: over every axis but the last.

    Args:
        x: inputs (B, ..., D).
        scale: (D,).
        offset: (D,).
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if scale or offset is not (D,).

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> y = bh.ops.batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), eps=0.0)
        >>> y.tolist()
        [[-1.0], [1.0]]

    References:
        Ioffe and Szegedy, "Batch normalization", 2015.
    """
    return _normalize("batch_norm", x, scale, offset, tuple(range(x.ndim - 1)), eps)


def _normalize(
    name: str, x: Array, scale: Array, offset: Array, axes: tuple[int, ...], eps: float
) -> tuple[Array, Residuals]:
    need_floating(name, x)
    if x.ndim < 2 or scale.shape != x.shape[-1:] or offset.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} needs x of shape (B, ..., D) with scale and offset of shape (D,), got "
            f"{x.shape}, {scale.shape} and {offset.shape}"
        )
    wide = upcast(x)
    mean = _mean(wide, axes)
    rstd = 1 / jnp.sqrt(_mean(jnp.square(wide - mean), axes) + eps)
    residuals = Residuals(x, mean, rstd, scale, offset)
    return affine(residuals.h, scale, offset).astype(x.dtype), residuals


def normalization_backward(
    residuals: Residuals, dy: Float[Array, "... D"], axes: tuple[int, ...]
) -> tuple[Float[Array, "... D"], Total, Total]:
    """The errors of x, scale and offset, the last two not yet summed."""
    h, dy = residuals.h, upcast(dy)
    g = dy * last_axis(residuals.scale.astype(dy.dtype), dy)
    dx = residuals.rstd * (g - _mean(g, axes) - h * _mean(g * h, axes))
    return like_primal(dx, residuals.x), Total(dy * h), Total(dy)


def layer_norm_backward(
    residuals: Residuals, dy: Float[Array, "... D"], *, eps: float = 1e-5
) -> tuple[Float[Array, "... D"], Float[Array, " D"], Float[Array, " D"]]:
    dx, dscale, doffset = normalization_backward(residuals, dy, (dy.ndim - 1,))
    return dx, total(dscale, residuals.scale), total(doffset, residuals.offset)


def batch_norm_backward(
    residuals: Residuals, dy: Float[Array, "... D"], *, eps: float = 1e-5
) -> tuple[Float[Array, "... D"], Float[Array, " D"], Float[Array, " D"]]:
    dx, dscale, doffset = normalization_backward(residuals, dy, tuple(range(dy.ndim - 1)))
    return dx, total(dscale, residuals.scale), total(doffset, residuals.offset)


def affine(
    h: Float[Array, "... D"], scale: Float[Array, " D"], offset: Float[Array, " D"]
) -> Float[Array, "... D"]:
    """h scale + offset, in the dtype of h."""
    return h * last_axis(scale.astype(h.dtype), h) + last_axis(offset.astype(h.dtype), h)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean over `axes`, which stay with length 1; 0 over no elements."""
    count = math.prod(x.shape[axis] for axis in axes)
    return jnp.sum(x, axes, keepdims=True) / max(1, count)


def layer_norm_reference(x: Array, scale: Array, offset: Array, *, eps: float = 1e-5) -> Array:
    wide = upcast(x)
    mean, var = jnp.mean(wide, -1, keepdims=True), jnp.var(wide, -1, keepdims=True)
    return affine((wide - mean) / jnp.sqrt(var + eps), scale, offset).astype(x.dtype)


def batch_norm_reference(x: Array, scale: Array, offset: Array, *, eps: float = 1e-5) -> Array:
    wide, axes = upcast(x), tuple(range(x.ndim - 1))
    mean, var = jnp.mean(wide, axes, keepdims=True), jnp.var(wide, axes, keepdims=True)
    return affine((wide - mean) / jnp.sqrt(var + eps), scale, offset).astype(x.dtype)


layer_norm = Op("layer_norm", layer_norm_forward, layer_norm_backward, layer_norm_reference)
batch_norm = Op("batch_norm", batch_norm_forward, batch_norm_backward, batch_norm_reference)
