"""Hinge losses: what is right by a margin costs nothing and is not blamed.

    two classes    l = max(0, m - s x),  s = 2 t - 1             dx = -s where l > 0, else 0
    V classes      l = max_v (x_v + m [v != y]) - x_y            dx = [v is the largest] - [v = y]

The second is 0, and without blame, where y leads every other class by the margin m. Classes that
are largest together share the blame, as `jnp.max` has it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from backhand.arrays import like_primal, need_integers, upcast
from backhand.losses.classification import check_labels, inside, probabilities
from backhand.losses.common import (
    Sum,
    check_shares,
    masked,
    need_predictions,
    pair,
    target_error,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.protocol import Loss

Residuals = tuple[Array, Array, Array | None]
Errors = tuple[Array, Array | None, Array | None]


def hinge_forward(
    logits: Float[Array, "*shape"],
    targets: Array,
    weights: Array | None = None,
    *,
    margin: float = 1.0,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = max(0, m - (2 t - 1) x) for each logit x.

    Args:
        logits: of any shape (B, ...).
        targets: of the same shape, 0 and 1 or booleans.
        weights: per example or per logit; see `weighted_sum`.
        margin: m, above 0.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes differ, or the margin is not above 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.hinge(jnp.array([2.0, 0.5]), jnp.array([1, 0]))
        >>> float(total), float(weight)
        (1.5, 2.0)

    References:
        Cortes and Vapnik, "Support-vector networks", 1995.
    """
    _check_margin("hinge", margin)
    x, t = pair("hinge", logits, targets)
    short = margin - (2 * t - 1) * x
    losses = jnp.where(short <= 0, 0, short)  # a maximum has XLA on CPU store an array of zeros
    total = weighted_sum("hinge", losses, weights)
    return total, (logits, targets, weights)


def hinge_backward(residuals: Residuals, dy: Sum, *, margin: float = 1.0) -> Errors:
    logits, targets, weights = residuals
    x, t = pair("", logits, targets)
    short = margin - (2 * t - 1) * x
    dlosses, dweights = weighted_sum_backward(jnp.maximum(short, 0), weights, dy)
    dx = masked(dlosses, jnp.where(short > 0, 1 - 2 * t, 0))
    dt = masked(dlosses, jnp.where(short > 0, -2 * x, 0))
    return like_primal(dx, logits), target_error(dt, targets), dweights


def hinge_reference(
    x: Array, t: Array, weights: Array | None = None, *, margin: float = 1.0
) -> Sum:
    x, t = pair("", x, t)
    return weighted_sum("", jax.nn.relu(margin - x * (2 * t - 1)), weights)


def multiclass_hinge_forward(
    logits: Float[Array, "*positions V"],
    targets: Integer[Array, "*positions"],
    weights: Array | None = None,
    *,
    margin: float = 1.0,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = max_v (x_v + m [v != y]) - x_y for each position.

    Args:
        logits: (B, ..., V).
        targets: integer labels y (B, ...) in [0, V). One outside gives NaN, so that it is noticed,
            unless its weight is 0.
        weights: per example or per position; see `weighted_sum`.
        margin: m, above 0.

    Raises:
        TypeError: if logits are not floating point, or targets not integers.
        ValueError: if the shapes do not fit, or the margin is not above 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, _ = bh.losses.multiclass_hinge(jnp.array([[2.0, 1.5, 0.0]]), jnp.array([0]))
        >>> float(total)
        0.5

    References:
        Crammer and Singer, "On the algorithmic implementation of multiclass kernel-based vector
        machines", 2001.
    """
    _check_margin("multiclass_hinge", margin)
    need_predictions("multiclass_hinge", logits, "logits")
    need_integers("multiclass_hinge", "labels", targets)
    if logits.ndim == 0 or targets.shape != logits.shape[:-1] or logits.shape[-1] == 0:
        raise ValueError(
            f"multiclass_hinge needs, for logits {logits.shape}, labels of shape "
            f"{logits.shape[:-1]}; got {targets.shape}"
        )
    losses, _, _ = _margins(logits, targets, margin)
    return weighted_sum("multiclass_hinge", losses, weights), (logits, targets, weights)


def multiclass_hinge_backward(residuals: Residuals, dy: Sum, *, margin: float = 1.0) -> Errors:
    logits, targets, weights = residuals
    losses, largest, label = _margins(logits, targets, margin)
    dlosses, dweights = weighted_sum_backward(losses, weights, dy)
    dlosses = jnp.where(inside(targets, logits), dlosses, 0)[..., None]
    share = largest / jnp.sum(largest, -1, keepdims=True)
    return like_primal(masked(dlosses, share - label), logits), None, dweights


def _margins(logits: Array, targets: Array, margin: float) -> tuple[Array, Array, Array]:
    """The losses, and as 0 and 1 which classes are largest and which is true."""
    x = upcast(logits)
    label = probabilities(targets, x, 0.0)
    ahead = x + margin * (1 - label)
    top = jnp.max(ahead, -1, keepdims=True)
    losses = top[..., 0] - jnp.sum(jnp.where(label == 0, 0, x), -1)
    losses = jnp.where(inside(targets, x), losses, jnp.nan)
    return losses, (ahead == top).astype(x.dtype), label


def multiclass_hinge_reference(
    x: Array, targets: Array, weights: Array | None = None, *, margin: float = 1.0
) -> Sum:
    x = upcast(x)
    label = jax.nn.one_hot(targets, x.shape[-1], dtype=x.dtype)
    losses = jnp.max(x + margin - margin * label, -1) - jnp.sum(x * label, -1)
    return weighted_sum("", losses, weights)


def _check_margin(name: str, margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"{name} needs a margin above 0, got {margin}")


hinge = Loss("hinge", hinge_forward, hinge_backward, hinge_reference, check_shares)
multiclass_hinge = Loss(
    "multiclass_hinge",
    multiclass_hinge_forward,
    multiclass_hinge_backward,
    multiclass_hinge_reference,
    check_labels,
)
