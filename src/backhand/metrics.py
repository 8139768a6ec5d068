"""Metrics: what is reported beside the loss. Not differentiated, but summed and divided alike.

A metric is a function of (predictions, targets, weights=None) that gives a sum and a weight; so is
every loss, called.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def accuracy(
    logits: Float[Array, "*positions V"],
    targets: Int[Array, "*positions"],
    weights: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted count of positions whose largest logit is the label's, and the weight.

    Args:
        logits: (B, ..., V).
        targets: integer labels (B, ...).
        weights: per example or per position, its shape a prefix of that of the targets.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> hits, weight = accuracy(jnp.eye(3), jnp.array([0, 1, 0]))
        >>> float(hits), float(weight)
        (2.0, 3.0)
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"accuracy needs labels of shape {logits.shape[:-1]}, got {targets.shape}")
    hits = (jnp.argmax(logits, -1).astype(targets.dtype) == targets).astype(jnp.float32)
    if weights is None:
        return jnp.sum(hits), jnp.asarray(hits.size, jnp.float32)
    if weights.shape != hits.shape[: weights.ndim]:
        raise ValueError(
            f"accuracy needs weights whose shape begins as that of the labels {hits.shape}, got "
            f"{weights.shape}"
        )
    w = weights.astype(jnp.float32).reshape(weights.shape + (1,) * (hits.ndim - weights.ndim))
    return jnp.sum(w * hits), jnp.sum(jnp.broadcast_to(w, hits.shape))
