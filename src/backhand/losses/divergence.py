"""Kullback-Leibler divergence: how far predicted probabilities are from true ones.

With p the probabilities that the logits x stand for, and t the true ones,

    l = sum_v t_v (log t_v - log p_v)        dx = p sum(t) - t        dt = log t + 1 - log p

which is the cross-entropy less what no prediction can avoid, the entropy of t. So the blame is the
cross-entropy's, and the loss is 0 where p = t. A class with t_v = 0 adds nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import is_floating, like_primal, upcast
from backhand.losses.common import (
    Sum,
    check_weights,
    finite_top,
    masked,
    pair,
    softmax_error,
    target_error,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.protocol import Loss


class Residuals(NamedTuple):
    """The logits, the two numbers per position that their p come from, and log t - log p."""

    logits: Float[Array, "*positions V"]
    top: Float[Array, "*positions 1"]
    sum_exp: Float[Array, "*positions 1"]
    difference: Float[Array, "*positions V"]
    losses: Float[Array, "*positions"]
    targets: Array
    weights: Array | None


def kl_divergence_forward(
    logits: Float[Array, "*positions V"],
    targets: Array,
    weights: Array | None = None,
    *,
    log_targets: bool = False,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = sum_v t_v (log t_v - log p_v) for each position.

    Args:
        logits: (B, ..., V). Log-probabilities are logits too.
        targets: true probabilities t, of the same shape; log t if `log_targets`, as a teacher's
            `jax.nn.log_softmax` gives, which keeps the digits of small ones.
        weights: per example or per position; see `weighted_sum`.
        log_targets: whether targets are logarithms.

    Raises:
        TypeError: if logits or logarithms are not floating point.
        ValueError: if the shapes differ.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.kl_divergence(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
        >>> round(float(total / weight), 4)
        0.6931

    References:
        Kullback and Leibler, "On information and sufficiency", 1951.
        Hinton et al., "Distilling the knowledge in a neural network", 2015.
    """
    x, t = pair("kl_divergence", logits, targets)
    if logits.ndim == 0:
        raise ValueError("kl_divergence needs logits of shape (..., V), got a scalar")
    if log_targets and not is_floating(targets):
        raise TypeError(f"kl_divergence needs floating-point log_targets, got {targets.dtype}")
    top = finite_top(x)
    sum_exp = jnp.sum(jnp.exp(x - top), -1, keepdims=True)
    true, log_t = _both(t, log_targets)
    difference = log_t - (x - top - jnp.log(sum_exp))
    losses = jnp.sum(jnp.where(true == 0, 0, true * difference), -1)
    total = weighted_sum("kl_divergence", losses, weights)
    return total, Residuals(logits, top, sum_exp, difference, losses, targets, weights)


def kl_divergence_backward(
    residuals: Residuals, dy: Sum, *, log_targets: bool = False
) -> tuple[Array, Array | None, Array | None]:
    logits, top, sum_exp, difference, losses, targets, weights = residuals
    x, given = pair("", logits, targets)
    dlosses, dweights = weighted_sum_backward(losses, weights, dy)
    dlosses = dlosses[..., None]
    t = jnp.exp(given) if log_targets else given
    whole = jnp.sum(t, -1, keepdims=True)
    dx = softmax_error(dlosses * whole, x - top, sum_exp) - masked(dlosses, t)
    if log_targets:
        dt = masked(dlosses, jnp.where(t == 0, 0, t * (difference + 1)))
    else:
        dt = masked(dlosses, difference + (t != 0).astype(t.dtype))
    return like_primal(dx, logits), target_error(dt, targets), dweights


def _both(given: Array, log_targets: bool) -> tuple[Array, Array]:
    """Probabilities and their logarithms; any number for the logarithm of 0."""
    if log_targets:
        return jnp.exp(given), given
    return given, jnp.log(jnp.where(given == 0, 1, given))


def kl_divergence_reference(
    x: Array, targets: Array, weights: Array | None = None, *, log_targets: bool = False
) -> Sum:
    log_p = jax.nn.log_softmax(upcast(x))
    t = targets.astype(log_p.dtype)
    if log_targets:
        losses = jnp.sum(jnp.exp(t) * jnp.where(t == -jnp.inf, 0, t - log_p), -1)
    else:
        entropy = jnp.sum(jnp.where(t == 0, 0, t * jnp.log(jnp.where(t == 0, 1, t))), -1)
        losses = entropy - jnp.sum(t * log_p, -1)
    return weighted_sum("", losses, weights)


kl_divergence = Loss(
    "kl_divergence",
    kl_divergence_forward,
    kl_divergence_backward,
    kl_divergence_reference,
    check_weights,
)
