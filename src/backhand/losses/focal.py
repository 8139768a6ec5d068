"""Focal losses: cross-entropy that turns away from what is right already.

With p the probability of the truth, its logarithm is weighed by how much is missing:

    l = -(1 - p)^g log p        dl / d(log p) = -(1 - p)^g + g (1 - p)^(g - 1) p log p

and g = 0 is the cross-entropy. For two classes 1 - p is q = t (1 - s) + (1 - t) s, with s the
sigmoid of the logit, so that soft targets have a loss too; c is their cross-entropy:

    l = a q^g c        dx = a (q^g (s - t) + g q^(g - 1) c (1 - 2 t) s (1 - s))
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from backhand.arrays import is_floating, like_primal, number, upcast
from backhand.losses.classification import check_classes, check_labels, inside, probabilities
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
Errors = tuple[Array, Array | None, Array | None]


class Softmax(NamedTuple):
    """The exponentials of the logits over their largest, their sum, and log p of the truth."""

    logits: Float[Array, "*positions V"]
    targets: Num[Array, "..."]
    weights: Array | None
    losses: Float[Array, "*positions"]
    e: Float[Array, "*positions V"]
    summed: Float[Array, "*positions 1"]
    log_p: Float[Array, "*positions _"]


def sigmoid_focal_forward(
    logits: Float[Array, "*shape"],
    targets: Array,
    weights: Array | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = a q^g c for each logit; see above.

    Args:
        logits: of any shape (B, ...).
        targets: of the same shape, in [0, 1].
        weights: per example or per logit; see `weighted_sum`.
        gamma: g, at least 0.
        alpha: in [0, 1], the weight a of a positive, 1 - alpha that of a negative; None for 1.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes differ, or a setting is outside of what is stated above.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, _ = bh.losses.sigmoid_focal(jnp.zeros(1), jnp.array([1]), gamma=2.0)
        >>> round(float(total), 4)  # log 2 / 4
        0.1733

    References:
        Lin et al., "Focal loss for dense object detection", 2017.
    """
    _check("sigmoid_focal", gamma, alpha)
    x, t = pair("sigmoid_focal", logits, targets)
    q, c, a, *_ = _sigmoid_parts(x, t, alpha)
    losses = a * _power(q, gamma) * c
    return weighted_sum("sigmoid_focal", losses, weights), (logits, targets, weights)


def sigmoid_focal_backward(
    residuals: Residuals, dy: Sum, *, gamma: float = 2.0, alpha: float | None = None
) -> Errors:
    logits, targets, weights = residuals
    x, t = pair("", logits, targets)
    q, c, a, s, rest = _sigmoid_parts(x, t, alpha)
    f = _power(q, gamma)
    dlosses, dweights = weighted_sum_backward(a * f * c, weights, dy)
    dx, dt = f * ((1 - t) * s - t * rest), -f * x
    if gamma:
        df = gamma * _power(q, gamma - 1) * c
        dx = dx + df * ((1 - 2 * t) * (s * rest))
        dt = dt + df * (1 - 2 * s)
    dx, dt = a * dx, a * dt + (0.0 if alpha is None else (2 * alpha - 1) * f * c)
    return (
        like_primal(masked(dlosses, dx), logits),
        target_error(masked(dlosses, dt), targets),
        dweights,
    )


def _sigmoid_parts(
    x: Array, t: Array, alpha: float | None
) -> tuple[Array, Array, Any, Array, Array]:
    """What is missing, the cross-entropy, the weight of the class, the sigmoid, the rest to 1."""
    s, other = jax.lax.logistic(x), jax.lax.logistic(-x)
    # Of a large x all digits, else those that s has lost: what makes the error round less.
    rest = jnp.where(x > 2, other, 1 - s)
    q = t * other + (1 - t) * s
    c = jnp.maximum(x, 0) - x * t + jnp.log1p(jnp.exp(-jnp.abs(x)))
    return q, c, 1.0 if alpha is None else alpha * t + (1 - alpha) * (1 - t), s, rest


def sigmoid_focal_reference(
    x: Array,
    t: Array,
    weights: Array | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> Sum:
    x, t = pair("", x, t)
    p = jax.nn.sigmoid(x)
    losses = -t * jax.nn.log_sigmoid(x) - (1 - t) * jax.nn.log_sigmoid(-x)
    losses = losses * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    if alpha is not None:
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    return weighted_sum("", losses, weights)


def softmax_focal_forward(
    logits: Float[Array, "*positions V"],
    targets: Num[Array, "..."],
    weights: Array | None = None,
    *,
    gamma: float = 2.0,
) -> tuple[Sum, Softmax]:
    """sum(w l) and sum(w), with l = -sum_v t_v (1 - p_v)^g log p_v for each position.

    Args:
        logits: (B, ..., V).
        targets: integer labels (B, ...) in [0, V), or true probabilities (B, ..., V). A label
            outside gives NaN, so that it is noticed, unless its weight is 0.
        weights: per example or per position; see `weighted_sum`.
        gamma: g, at least 0.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes do not fit, or gamma is negative.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, _ = bh.losses.softmax_focal(jnp.zeros((1, 2)), jnp.array([0]), gamma=2.0)
        >>> round(float(total), 4)
        0.1733
    """
    _check("softmax_focal", gamma)
    check_classes("softmax_focal", logits, targets)
    x = upcast(logits)
    top = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(x - top)
    summed = jnp.sum(e, -1, keepdims=True)
    losses, log_p = _of_truth(x - top, targets, jnp.log(summed), gamma)
    total = weighted_sum("softmax_focal", losses, weights)
    return total, Softmax(logits, targets, weights, losses, e, summed, log_p)


def softmax_focal_backward(residuals: Softmax, dy: Sum, *, gamma: float = 2.0) -> Errors:
    _, targets, weights, losses, e, summed, log_p = residuals
    dlosses, dweights = weighted_sum_backward(losses, weights, dy)
    dlosses = jnp.where(inside(targets, e), dlosses, 0)[..., None]
    error = _error(log_p, dlosses, gamma)
    t = probabilities(targets, e, 0.0)
    dt = None
    if is_floating(targets):
        g = jnp.where(t == 0, 0, t * error)
        dx = g - e * (jnp.sum(g, -1, keepdims=True) / summed)
        dt = target_error(masked(dlosses, -_power(-jnp.expm1(log_p), gamma) * log_p), targets)
    else:
        dx = t * error - e * (error / summed)
    dx = jnp.where((dlosses == 0) & ~jnp.isfinite(dx), 0, dx)
    return like_primal(dx, residuals.logits), dt, dweights


def _of_truth(x: Array, targets: Array, log_sum: Array, gamma: float) -> tuple[Array, Array]:
    """The losses, and log p: of every class for probabilities, of the label alone for labels."""
    t = probabilities(targets, x, 0.0)
    if is_floating(targets):
        log_p = x - log_sum
        each = -_power(-jnp.expm1(log_p), gamma) * log_p
        return jnp.sum(jnp.where(t == 0, 0, t * each), -1), log_p
    log_p = jnp.sum(jnp.where(t == 0, 0, x), -1, keepdims=True) - log_sum
    losses = -_power(-jnp.expm1(log_p), gamma) * log_p
    return jnp.where(inside(targets, x), losses[..., 0], jnp.nan), log_p


def _error(log_p: Array, dlosses: Array, gamma: float) -> Array:
    """The error of log p: its slope, each term of it times that of the loss, which rounds less."""
    q = -jnp.expm1(log_p)
    error = -_power(q, gamma) * dlosses
    if not gamma:
        return error
    return error + gamma * _power(q, gamma - 1) * jnp.exp(log_p) * log_p * dlosses


def softmax_focal_reference(
    x: Array, targets: Array, weights: Array | None = None, *, gamma: float = 2.0
) -> Sum:
    log_p = jax.nn.log_softmax(upcast(x))
    if not is_floating(targets):
        targets = jax.nn.one_hot(targets, x.shape[-1], dtype=log_p.dtype)
    t = targets.astype(log_p.dtype)
    return weighted_sum("", -jnp.sum(t * (1 - jnp.exp(log_p)) ** gamma * log_p, -1), weights)


def _power(q: Array, gamma: float) -> Array:
    """q^g, with a derivative of 0 at 0."""
    if gamma == int(gamma):
        return jax.lax.integer_pow(q, int(gamma))
    return jnp.where(q == 0, 0, jnp.where(q == 0, 1, q) ** gamma)


def _check(name: str, gamma: float, alpha: float | None = None) -> None:
    if not number(f"{name}'s gamma", gamma) >= 0:
        raise ValueError(f"{name} needs gamma of 0 or more, got {gamma}")
    if alpha is not None and not 0 <= number(f"{name}'s alpha", alpha) <= 1:
        raise ValueError(f"{name} needs alpha in [0, 1], or None; got {alpha}")


sigmoid_focal = Loss(
    "sigmoid_focal",
    sigmoid_focal_forward,
    sigmoid_focal_backward,
    sigmoid_focal_reference,
    check_shares,
)
softmax_focal = Loss(
    "softmax_focal",
    softmax_focal_forward,
    softmax_focal_backward,
    softmax_focal_reference,
    check_labels,
)
