"""Root mean square normalization: x over the root of its mean square, then scaled.

With r = 1 / sqrt(mean(x^2) + eps) over the n features of an example and h = x r:

    y = h scale

The error g = dy scale of h reaches x directly, and through r, whose derivative is -h r^2 / n in
each feature. That path takes out of g its part along h:

    dx = r (g - h mean(g h))        dscale = sum(dy h)

Saved are x and r, one number an example; h is computed again. All of it runs in at least float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import last_axis, like_primal, upcast
from backhand.contributions import Total, total
from backhand.ops.averages import over_features
from backhand.ops.normalization import check_affine
from backhand.protocol import Op


class Residuals(NamedTuple):
    """x, one over the root of its mean square, and the scale."""

    x: Float[Array, "... D"]
    inverse: Float[Array, "... 1"]
    scale: Float[Array, " D"]


def rms_norm_forward(
    x: Float[Array, "... D"], scale: Float[Array, " D"], *, eps: float = 1e-6
) -> tuple[Float[Array, "... D"], Residuals]:
    """RMS normalization over the last axis.

    Args:
        x: inputs (B, ..., D).
        scale: (D,).
        eps: added to the mean square.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if scale is not (D,).

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.rms_norm(jnp.array([[1.0, 7.0]]), jnp.ones(2), eps=0.0).tolist()
        [[0.2, 1.4]]

    References:
        Zhang and Sennrich, "Root mean square layer normalization", 2019.
    """
    check_affine("rms_norm", x, scale)
    wide = upcast(x)
    inverse = 1 / jnp.sqrt(over_features(wide)(jnp.square(wide)) + eps)
    y = wide * inverse * last_axis(scale.astype(wide.dtype), wide)
    return y.astype(x.dtype), Residuals(x, inverse, scale)


def rms_norm_errors(
    residuals: Residuals, dy: Float[Array, "... D"]
) -> tuple[Float[Array, "... D"], Total]:
    """The errors of x and of scale, the last not yet summed."""
    x, r, dy = upcast(residuals.x), residuals.inverse, upcast(dy)
    scale, dscale = residuals.scale.astype(dy.dtype), dy * (x * r)
    along = over_features(x).mean(dscale, scale)
    dx = r * (dy * last_axis(scale, dy) - x * (r * along))
    return like_primal(dx, residuals.x), Total(dscale)


def rms_norm_backward(
    residuals: Residuals, dy: Float[Array, "... D"], *, eps: float = 1e-6
) -> tuple[Float[Array, "... D"], Float[Array, " D"]]:
    dx, dscale = rms_norm_errors(residuals, dy)
    return dx, total(dscale, residuals.scale)


def rms_norm_reference(x: Array, scale: Array, *, eps: float = 1e-6) -> Array:
    wide = upcast(x)
    root = jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return (wide / root * last_axis(scale.astype(wide.dtype), wide)).astype(x.dtype)


rms_norm = Op("rms_norm", rms_norm_forward, rms_norm_backward, rms_norm_reference)
