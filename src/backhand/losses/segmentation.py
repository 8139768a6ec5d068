"""Dice loss: how little two regions overlap, whatever their size.

With p the sigmoids of the logits and t the true pixels, summed over the pixels of an example,

    l = 1 - n / d,    n = 2 sum p t + s,    d = sum p + sum t + s

    dp = (n / d - 2 t) / d        dx = dp p (1 - p)        dt = (n / d - 2 p) / d

A region is one loss, so a small one counts as much as a large one: its pixels are blamed more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import like_primal
from backhand.losses.common import (
    Sum,
    check_shares,
    masked,
    pair,
    target_error,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.protocol import Loss

Residuals = tuple[Array, Array, Array | None]


def dice_forward(
    logits: Float[Array, "B *pixels C"],
    targets: Array,
    weights: Array | None = None,
    *,
    smooth: float = 1.0,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = 1 - (2 sum p t + s) / (sum p + sum t + s) for each region.

    Args:
        logits: (B, pixels..., C), each channel a region of its own.
        targets: of the same shape, in [0, 1]: booleans, 0 and 1, or shares.
        weights: per example (B,), or per example and channel (B, C).
        smooth: s above 0; an empty region that is predicted empty has loss 0.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes differ or there is no axis of pixels, or s is not above 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> logits = jnp.asarray([[[30.0], [30.0], [-30.0]]])
        >>> total, _ = bh.losses.dice(logits, jnp.asarray([[[1], [0], [0]]]))
        >>> float(total)  # 1 - (2 + 1) / (3 + 1)
        0.25

    References:
        Milletari et al., "V-Net", 2016.
    """
    if not smooth > 0:
        raise ValueError(f"dice needs smooth above 0, got {smooth}")
    if logits.ndim < 3:
        raise ValueError(
            f"dice needs logits of shape (B, pixels..., C), got {logits.shape}; add a channel "
            "axis with logits[..., None]"
        )
    x, t = pair("dice", logits, targets)
    n, d = _parts(jax.lax.logistic(x), t, smooth)
    return weighted_sum("dice", 1 - n / d, weights), (logits, targets, weights)


def dice_backward(
    residuals: Residuals, dy: Sum, *, smooth: float = 1.0
) -> tuple[Array, Array | None, Array | None]:
    logits, targets, weights = residuals
    x, t = pair("", logits, targets)
    p = jax.lax.logistic(x)
    n, d = _parts(p, t, smooth)
    dlosses, dweights = weighted_sum_backward(1 - n / d, weights, dy)
    pixels = tuple(range(1, x.ndim - 1))
    rest = jnp.where(x > 0, jax.lax.logistic(-x), 1 - p)  # 1 - p, whose digits a large x would lose
    dlosses, share, inverse = (jnp.expand_dims(y, pixels) for y in (dlosses, n / d, 1 / d))
    dx = masked(dlosses, (share - 2 * t) * inverse * (p * rest))
    dt = masked(dlosses, (share - 2 * p) * inverse)
    return like_primal(dx, logits), target_error(dt, targets), dweights


def _parts(p: Array, t: Array, smooth: float) -> tuple[Array, Array]:
    """n and d, (B, C)."""
    pixels = tuple(range(1, p.ndim - 1))
    return 2 * jnp.sum(p * t, pixels) + smooth, jnp.sum(p + t, pixels) + smooth


def dice_reference(x: Array, t: Array, weights: Array | None = None, *, smooth: float = 1.0) -> Sum:
    x, t = pair("", x, t)
    p, pixels = jax.nn.sigmoid(x), tuple(range(1, x.ndim - 1))
    both = 2 * jnp.sum(p * t, pixels) + smooth
    losses = 1 - both / (jnp.sum(p, pixels) + jnp.sum(t, pixels) + smooth)
    return weighted_sum("", losses, weights)


dice = Loss("dice", dice_forward, dice_backward, dice_reference, check_shares)
