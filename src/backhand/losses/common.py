"""What losses share: weights, and the sum that they are weighted in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from backhand.arrays import is_floating, like_primal, need_array, upcast

Sum = tuple[Float[Array, ""], Float[Array, ""]]


def weighted_sum(name: str, losses: Float[Array, "..."], weights: Array | None) -> Sum:
    """sum(w l) and sum(w) over all positions.

    Args:
        name: of the loss, for errors.
        losses: one loss per position (B, ...).
        weights: per example (B,) or per position, its shape a prefix of that of `losses`; booleans
            count as 0 and 1. None weighs every position 1. A position of weight 0 is left out,
            whatever its loss, infinite and NaN included.

    Raises:
        ValueError: if the shape of the weights is not a prefix.
    """
    w = spread(name, weights, losses)
    return jnp.sum(masked(w, losses)), jnp.sum(w)


def weighted_sum_backward(
    losses: Float[Array, "..."], weights: Array | None, dy: Sum
) -> tuple[Float[Array, "..."], Array | None]:
    """dl = w d(total), and dw = l d(total) + d(weight) where weights have an error."""
    dtotal, dweight = (d.astype(losses.dtype) for d in dy)
    dlosses = spread("", weights, losses) * dtotal
    if weights is None or not is_floating(weights):
        return dlosses, None
    each = losses * dtotal + dweight
    dweights = jnp.sum(each, tuple(range(weights.ndim, losses.ndim)))
    return dlosses, like_primal(dweights, weights)


def masked(w: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """W x, and 0 where w is 0 even if x is infinite or NaN; its derivative in w stays x."""
    return w * jnp.where((w == 0) & ~jnp.isfinite(x), 0, x)


def finite_top(x: Float[Array, "*positions V"]) -> Float[Array, "*positions 1"]:
    """The largest of the last axis, which is taken away before exponentials; 0 for one not finite.

    Nothing depends on it, so it has no gradient. XLA on CPU fuses a plain maximum with what it is
    taken from, and then stores the difference: an array as large as x.
    """
    top = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True, initial=-jnp.inf))
    return jnp.where(jnp.isfinite(top), top, 0)


def softmax_error(
    w: Float[Array, "*positions 1"],
    z: Float[Array, "*positions V"],
    sum_exp: Float[Array, "*positions 1"],
) -> Float[Array, "*positions V"]:
    """w softmax(z), 0 where w is 0, as `masked`; asked once for a position, not for each z."""
    left_out = (w == 0) & ~jnp.isfinite(sum_exp)
    return jnp.where(left_out, 0, jnp.exp(z) * masked(w, 1 / sum_exp))


def pair(name: str, predictions: Array, targets: Array) -> tuple[Array, Array]:
    """Predictions and targets of one shape, in the dtype that the loss runs in.

    Raises:
        TypeError: if predictions are not floating point.
        ValueError: if the shapes differ.
    """
    need_predictions(name, predictions)
    need_array(name, "targets", targets)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"{name} needs predictions and targets of one shape, got {predictions.shape} and "
            f"{targets.shape}; add or drop an axis, as in targets[:, None] or predictions[:, 0]"
        )
    wide = upcast(predictions)
    return wide, targets.astype(wide.dtype)


def need_predictions(name: str, x: Any, what: str = "predictions") -> None:
    """Refuses what is not one floating-point array.

    Raises:
        TypeError: saying what it is, and which loss is for more.
    """
    if not hasattr(x, "dtype"):
        raise TypeError(
            f"{name} needs one array of {what}, got a {type(x).__name__} of {len(x)}; a balance or "
            "a state beside them is for losses.with_balance and losses.with_state, and "
            "chain(model, pick(0)) leaves it out"
        )
    if not is_floating(x):
        raise TypeError(f"{name} needs floating-point {what}, got {x.dtype}")


def target_error(error: Array, targets: Array) -> Array | None:
    """The error of the targets in their dtype; None where they are integers or booleans."""
    return like_primal(error, targets) if is_floating(targets) else None


def check_weights(predictions: Any, targets: Any, weights: Any) -> None:
    """Refuses weights on the host that are negative or NaN.

    Raises:
        ValueError: saying where.
    """
    if isinstance(weights, np.ndarray) and not (weights >= 0).all():
        where = np.unravel_index(int(np.argmin(weights)), weights.shape)
        place = [int(i) for i in where]
        raise ValueError(
            f"weights must be 0 or more, got {weights[where]} at {place}; a mask is a weight of 0"
        )


def check_shares(logits: Any, targets: Any, weights: Any) -> None:
    """Refuses, on the host, targets outside of [0, 1] that have weight.

    Raises:
        ValueError: saying which, where; for negative weights too.
    """
    check_weights(logits, targets, weights)
    if isinstance(targets, np.ndarray):
        place = first_weighed(~((targets >= 0) & (targets <= 1)), weights)
        if place is not None:
            raise ValueError(
                f"targets must lie in [0, 1], no and yes, got {targets[place]} at {list(place)}; "
                "give a position without a target weight 0"
            )


def first_weighed(wrong: np.ndarray, weights: Any) -> tuple[int, ...] | None:
    """Where the first target of some weight is that is wrong; None where none is."""
    if isinstance(weights, np.ndarray) and weights.shape == wrong.shape[: weights.ndim]:
        wrong &= (weights != 0).reshape(weights.shape + (1,) * (wrong.ndim - weights.ndim))
    return tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else None


def spread(name: str, weights: Array | None, losses: Array) -> Array:
    """A weight for each position, in the dtype of the losses; a negative one is NaN.

    On the host it is refused (`check_weights`), but a device cannot raise.
    """
    if weights is None:
        return jnp.ones_like(losses)
    need_array(name, "weights", weights)
    if weights.shape != losses.shape[: weights.ndim]:
        raise ValueError(
            f"{name} needs weights whose shape begins as that of the positions {losses.shape}: "
            f"one per example or one per position; got {weights.shape}"
        )
    w = weights.reshape(weights.shape + (1,) * (losses.ndim - weights.ndim))
    w = jnp.broadcast_to(w, losses.shape).astype(losses.dtype)
    return jnp.where(w < 0, jnp.nan, w)
