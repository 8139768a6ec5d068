"""Losses for numbers: squared, absolute and Huber's error.

With e = prediction - target, the blame of the output is the slope of the loss in e, the target's
its opposite:

    squared      e^2                                     2 e
    absolute     |e|                                     sign(e), 1 at 0 as JAX has it
    Huber        e^2/2 to |e| = delta, then linear       e, clipped to [-delta, delta]

Each is a sum over all elements with its weight; the mean is over elements.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import like_primal
from backhand.losses.common import (
    Sum,
    check_weights,
    masked,
    pair,
    target_error,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.protocol import Loss

X = Float[Array, "*shape"]
Residuals = tuple[Array, Array, Array | None]
Errors = tuple[Array, Array | None, Array | None]


def mean_squared_error_forward(
    predictions: X, targets: Array, weights: Array | None = None
) -> tuple[Sum, Residuals]:
    """sum(w (p - t)^2) and sum(w): their quotient is the mean squared error.

    Args:
        predictions: of any shape (B, ...).
        targets: of the same shape.
        weights: per example or per element; see `weighted_sum`.

    Raises:
        TypeError: if predictions are not floating point.
        ValueError: if the shapes differ.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.mean_squared_error(jnp.array([1.0, 4.0]), jnp.array([1, 2]))
        >>> float(total), float(weight)
        (4.0, 2.0)
    """
    p, t = pair("mean_squared_error", predictions, targets)
    total = weighted_sum("mean_squared_error", jnp.square(p - t), weights)
    return total, (predictions, targets, weights)


def mean_squared_error_backward(residuals: Residuals, dy: Sum) -> Errors:
    return _backward(residuals, dy, jnp.square, lambda e, dlosses: masked(dlosses, 2 * e))


def mean_squared_error_reference(p: Array, t: Array, weights: Array | None = None) -> Sum:
    return _reference(p, t, weights, lambda e: e**2)


def mean_absolute_error_forward(
    predictions: X, targets: Array, weights: Array | None = None
) -> tuple[Sum, Residuals]:
    """sum(w |p - t|) and sum(w): their quotient is the mean absolute error.

    Args, raises: as `mean_squared_error`.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.mean_absolute_error(jnp.array([1.0, 4.0]), jnp.array([1, 2]))
        >>> float(total), float(weight)
        (2.0, 2.0)
    """
    p, t = pair("mean_absolute_error", predictions, targets)
    total = weighted_sum("mean_absolute_error", jnp.abs(p - t), weights)
    return total, (predictions, targets, weights)


def mean_absolute_error_backward(residuals: Residuals, dy: Sum) -> Errors:
    return _backward(
        residuals, dy, jnp.abs, lambda e, dlosses: jnp.where(e >= 0, dlosses, -dlosses)
    )


def mean_absolute_error_reference(p: Array, t: Array, weights: Array | None = None) -> Sum:
    return _reference(p, t, weights, jnp.abs)


def huber_forward(
    predictions: X, targets: Array, weights: Array | None = None, *, delta: float = 1.0
) -> tuple[Sum, Residuals]:
    """Squared error where it is small, absolute where it is large: e^2/2 or delta (|e| - delta/2).

    An outlier's blame is at most delta.

    Args:
        predictions: of any shape (B, ...).
        targets: of the same shape.
        weights: per example or per element; see `weighted_sum`.
        delta: where the two meet, above 0.

    Raises:
        TypeError: if predictions are not floating point.
        ValueError: if the shapes differ, or delta is not above 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.huber(jnp.array([0.5, 4.0]), jnp.zeros(2), delta=1.0)
        >>> float(total), float(weight)
        (3.625, 2.0)

    References:
        Huber, "Robust estimation of a location parameter", 1964.
    """
    if not delta > 0:
        raise ValueError(f"huber needs delta above 0, got {delta}")
    p, t = pair("huber", predictions, targets)
    total = weighted_sum("huber", _huber(p - t, delta), weights)
    return total, (predictions, targets, weights)


def huber_backward(residuals: Residuals, dy: Sum, *, delta: float = 1.0) -> Errors:
    return _backward(
        residuals,
        dy,
        lambda e: _huber(e, delta),
        lambda e, dlosses: masked(dlosses, jnp.clip(e, -delta, delta)),
    )


def _huber(e: Array, delta: float) -> Array:
    small = jnp.minimum(jnp.abs(e), delta)
    return small * (jnp.abs(e) - 0.5 * small)


def huber_reference(p: Array, t: Array, weights: Array | None = None, *, delta: float = 1.0) -> Sum:
    def value(e: Array) -> Array:
        return jnp.where(jnp.abs(e) <= delta, 0.5 * e**2, delta * (jnp.abs(e) - 0.5 * delta))

    return _reference(p, t, weights, value)


def _backward(
    residuals: Residuals,
    dy: Sum,
    value: Callable[[Array], Array],
    blame: Callable[[Array, Array], Array],
) -> Errors:
    """The errors of predictions, targets and weights, for a loss of p - t."""
    predictions, targets, weights = residuals
    p, t = pair("", predictions, targets)
    dlosses, dweights = weighted_sum_backward(value(p - t), weights, dy)
    error = blame(p - t, dlosses)
    return like_primal(error, predictions), target_error(-error, targets), dweights


def _reference(p: Array, t: Array, weights: Array | None, value: Callable[[Array], Array]) -> Sum:
    p, t = pair("", p, t)
    losses = value(p - t)
    if weights is None:
        return jnp.sum(losses), jnp.asarray(losses.size, losses.dtype)
    w = weights.astype(losses.dtype).reshape(weights.shape + (1,) * (p.ndim - weights.ndim))
    return jnp.sum(w * losses), jnp.sum(jnp.broadcast_to(w, losses.shape))


mean_squared_error = Loss(
    "mean_squared_error",
    mean_squared_error_forward,
    mean_squared_error_backward,
    mean_squared_error_reference,
    check_weights,
)
mean_absolute_error = Loss(
    "mean_absolute_error",
    mean_absolute_error_forward,
    mean_absolute_error_backward,
    mean_absolute_error_reference,
    check_weights,
)
huber = Loss("huber", huber_forward, huber_backward, huber_reference, check_weights)
