"""Cross-entropies: the loss of predicted probabilities, from logits.

With p the probabilities that the logits x stand for, and t the true ones, both losses have the same
error at the output, the articles' delta: what was predicted less what was true.

    sigmoid     -t log p - (1 - t) log(1 - p),     p = 1 / (1 + exp(-x))          dx = p - t
    softmax     -sum_v t_v log p_v,                p_v = exp(x_v) / sum exp(x)    dx = p sum(t) - t

Neither takes a logarithm of a probability, so both are exact at any finite logit. Label smoothing s
replaces t by (1 - s) t + s / V, with V = 2 for the sigmoid.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from backhand.arrays import is_floating, like_primal, need_array, number, upcast
from backhand.losses.common import (
    Sum,
    check_shares,
    check_weights,
    finite_top,
    first_weighed,
    masked,
    need_predictions,
    pair,
    softmax_error,
    target_error,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.protocol import Loss

Errors = tuple[Array, Array | None, Array | None]
Residuals = tuple[Array, Array, Array | None]


def sigmoid_cross_entropy_forward(
    logits: Float[Array, "*shape"],
    targets: Array,
    weights: Array | None = None,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = max(x, 0) - x t + log(1 + exp(-|x|)) for each logit x.

    For yes-or-no questions, one logit each.

    Args:
        logits: of any shape (B, ...).
        targets: of the same shape, in [0, 1]: 0 and 1, booleans, or probabilities.
        weights: per example or per logit; see `weighted_sum`.
        label_smoothing: s in [0, 1].

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes differ, or s is not in [0, 1].

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.sigmoid_cross_entropy(jnp.zeros(2), jnp.array([0, 1]))
        >>> round(float(total / weight), 4)
        0.6931
    """
    check_smoothing("sigmoid_cross_entropy", label_smoothing)
    x, t = pair("sigmoid_cross_entropy", logits, targets)
    losses = _binary_losses(x, _smooth(t, label_smoothing, 2))
    return weighted_sum("sigmoid_cross_entropy", losses, weights), (logits, targets, weights)


def sigmoid_cross_entropy_backward(
    residuals: Residuals, dy: Sum, *, label_smoothing: float = 0.0
) -> Errors:
    logits, targets, weights = residuals
    x, t = pair("", logits, targets)
    t = _smooth(t, label_smoothing, 2)
    dlosses, dweights = weighted_sum_backward(_binary_losses(x, t), weights, dy)
    # p - t, with all its digits where p is nearly t.
    dx = masked(dlosses, (1 - t) * jax.lax.logistic(x) - t * jax.lax.logistic(-x))
    dt = masked(dlosses, -x * (1 - label_smoothing))
    return like_primal(dx, logits), target_error(dt, targets), dweights


def _binary_losses(x: Array, t: Array) -> Array:
    return jnp.maximum(x, 0) - x * t + jnp.log1p(jnp.exp(-jnp.abs(x)))


def sigmoid_cross_entropy_reference(
    x: Array, t: Array, weights: Array | None = None, *, label_smoothing: float = 0.0
) -> Sum:
    x, t = pair("", x, t)
    t = t * (1 - label_smoothing) + label_smoothing / 2
    losses = -t * jax.nn.log_sigmoid(x) - (1 - t) * jax.nn.log_sigmoid(-x)
    return weighted_sum("", losses, weights)


sigmoid_cross_entropy = Loss(
    "sigmoid_cross_entropy",
    sigmoid_cross_entropy_forward,
    sigmoid_cross_entropy_backward,
    sigmoid_cross_entropy_reference,
    check_shares,
)


class SoftmaxResiduals(NamedTuple):
    """The logits, and the two numbers per position that their probabilities come from."""

    logits: Float[Array, "*positions V"]
    top: Float[Array, "*positions 1"]
    sum_exp: Float[Array, "*positions 1"]
    targets: Num[Array, "..."]
    weights: Array | None


def softmax_cross_entropy_forward(
    logits: Float[Array, "*positions V"],
    targets: Num[Array, "..."],
    weights: Array | None = None,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Sum, SoftmaxResiduals]:
    """sum(w l) and sum(w), with l = log sum_v exp(x_v) - sum_v t_v x_v for each position.

    For one answer out of V. Saves the logits and two numbers per position.

    Args:
        logits: (B, ..., V).
        targets: integer labels (B, ...) in [0, V), or true probabilities (B, ..., V). A label
            outside gives NaN, so that it is noticed, unless its weight is 0.
        weights: per example or per position; see `weighted_sum`.
        label_smoothing: s in [0, 1].

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes do not fit, or s is not in [0, 1].

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> total, weight = bh.losses.softmax_cross_entropy(logits, labels)
        >>> round(float(total / weight), 4)
        0.41

    References:
        Szegedy et al., "Rethinking the Inception architecture", 2015 (label smoothing).
    """
    check_smoothing("softmax_cross_entropy", label_smoothing)
    check_classes("softmax_cross_entropy", logits, targets)
    x = upcast(logits)
    top = finite_top(x)
    sum_exp = jnp.sum(jnp.exp(x - top), -1, keepdims=True)
    losses = _losses(x - top, sum_exp, targets, label_smoothing)
    total = weighted_sum("softmax_cross_entropy", losses, weights)
    return total, SoftmaxResiduals(logits, top, sum_exp, targets, weights)


def softmax_cross_entropy_backward(
    residuals: SoftmaxResiduals, dy: Sum, *, label_smoothing: float = 0.0
) -> Errors:
    logits, top, sum_exp, targets, weights = residuals
    z = upcast(logits) - top
    losses = _losses(z, sum_exp, targets, label_smoothing)
    dlosses, dweights = weighted_sum_backward(losses, weights, dy)
    dlosses = jnp.where(inside(targets, z), dlosses, 0)[..., None]
    t = probabilities(targets, z, label_smoothing)
    whole = jnp.sum(t, -1, keepdims=True) if is_floating(targets) else 1
    dx = softmax_error(dlosses * whole, z, sum_exp)
    dx -= masked(dlosses, t) if is_floating(targets) else dlosses * t
    dt = masked(dlosses, (label_smoothing - 1) * (z - jnp.log(sum_exp)))
    return like_primal(dx, logits), target_error(dt, targets), dweights


def _losses(z: Array, sum_exp: Array, targets: Array, label_smoothing: float) -> Array:
    """-sum_v t_v log p_v, log p = z - log sum exp, a position; NaN for a label there is not."""
    log_sum = jnp.log(sum_exp)
    if is_floating(targets):
        t = probabilities(targets, z, label_smoothing)
        return -jnp.sum(jnp.where(t == 0, 0, t * (z - log_sum)), -1)
    labels = jnp.clip(targets, 0, z.shape[-1] - 1)[..., None]
    losses = log_sum
    if label_smoothing < 1:  # 0 times a logit of -inf is no 0
        losses -= (1 - label_smoothing) * jnp.take_along_axis(z, labels, -1)
    if label_smoothing > 0:
        losses -= label_smoothing * jnp.mean(z, -1, keepdims=True)
    return jnp.where(inside(targets, z), losses[..., 0], jnp.nan)


def probabilities(targets: Array, log_p: Array, label_smoothing: float) -> Array:
    """The true probabilities (..., V), smoothed."""
    if not is_floating(targets):
        targets = targets[..., None] == jax.lax.broadcasted_iota(
            targets.dtype, log_p.shape, log_p.ndim - 1
        )
    return _smooth(targets.astype(log_p.dtype), label_smoothing, log_p.shape[-1])


def inside(targets: Array, log_p: Array) -> Array:
    """Whether each label is one of V, so that a label outside is never silently ignored."""
    if is_floating(targets):
        return jnp.ones(targets.shape[:-1], bool)
    return (targets >= 0) & (targets < log_p.shape[-1])


def check_classes(name: str, logits: Array, targets: Array) -> None:
    """Refuses targets that are neither labels nor probabilities of the logits.

    Raises:
        TypeError: if logits are not floating point.
        ValueError: if the shapes do not fit.
    """
    need_predictions(name, logits, "logits")
    need_array(name, "targets", targets)
    expected = logits.shape if is_floating(targets) else logits.shape[:-1]
    if logits.ndim == 0 or targets.shape != expected:
        raise ValueError(
            f"{name} needs, for logits {logits.shape}, integer labels of shape "
            f"{logits.shape[:-1]} or probabilities of shape {logits.shape}; got {targets.dtype} "
            f"of shape {targets.shape}"
        )


def check_labels(logits: Any, targets: Any, weights: Any) -> None:
    """Refuses, on the host, labels outside of [0, V) that have weight.

    Raises:
        ValueError: saying which label, where.
    """
    check_weights(logits, targets, weights)
    if not isinstance(targets, np.ndarray) or not np.issubdtype(targets.dtype, np.integer):
        return
    place = first_weighed((targets < 0) | (targets >= logits.shape[-1]), weights)
    if place is not None:
        raise ValueError(
            f"labels must lie in [0, {logits.shape[-1]}), the number of logits; got "
            f"{targets[place]} at {list(place)}; give a position without a label weight 0"
        )


def softmax_cross_entropy_reference(
    x: Array, targets: Array, weights: Array | None = None, *, label_smoothing: float = 0.0
) -> Sum:
    x = upcast(x)
    if not is_floating(targets):
        targets = jax.nn.one_hot(targets, x.shape[-1], dtype=x.dtype)
    t = targets.astype(x.dtype) * (1 - label_smoothing) + label_smoothing / x.shape[-1]
    return weighted_sum("", -jnp.sum(t * jax.nn.log_softmax(x), -1), weights)


softmax_cross_entropy = Loss(
    "softmax_cross_entropy",
    softmax_cross_entropy_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_reference,
    check_labels,
)


def _smooth(t: Array, label_smoothing: float, classes: int) -> Array:
    return t * (1 - label_smoothing) + label_smoothing / classes if label_smoothing else t


def check_smoothing(name: str, label_smoothing: float) -> None:
    """Refuses what is no share.

    Raises:
        TypeError: if it is no number.
        ValueError: outside of [0, 1].
    """
    if not 0 <= number(f"{name}'s label_smoothing", label_smoothing) <= 1:
        raise ValueError(f"{name} needs label_smoothing in [0, 1], got {label_smoothing}")
