"""A loss with the state of a recurrent model beside it."""

from typing import Any

import jax
from jax import Array

from backhand.arrays import is_floating, zeros_like
from backhand.protocol import Loss
from backhand.visit import PyTree


def with_state(loss: Loss) -> Loss:
    """A loss of predictions (y, state): `loss` of y. The state has an error of zero.

    So a recurrent model that gives its state trains as one that does not, and `bh.metrics.state`
    brings the state out of the step: truncated backpropagation through time, as
    `backhand.layers.recurrent` shows it.

    Args:
        loss: of y, targets and weights.

    Raises:
        TypeError: for what is no loss.
        ValueError: when run, for predictions that are not such a pair.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> loss = with_state(bh.losses.mean_squared_error)
        >>> total, weight = loss((jnp.ones((2, 3)), jnp.zeros((2, 4))), jnp.zeros((2, 3)))
        >>> float(total), float(weight)
        (6.0, 6.0)

    References:
        Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent
        network trajectories", 1990.
    """
    if not isinstance(loss, Loss):
        raise TypeError(f"with_state needs a loss such as bh.losses.huber, got {loss!r}")

    def forward(predictions: PyTree, targets: PyTree, weights: Array | None = None) -> PyTree:
        y, state = _parts(predictions)
        own, residuals = loss.forward(y, targets, weights)
        return own, (residuals, state)

    def backward(residuals: PyTree, dy: PyTree) -> tuple[PyTree, PyTree, Array | None]:
        of_loss, state = residuals
        dx, dtargets, dweights = loss.cotangents(of_loss, dy)
        return (dx, jax.tree.map(_nothing, state)), dtargets, dweights

    def reference(predictions: PyTree, targets: PyTree, weights: Array | None = None) -> PyTree:
        return loss.reference(predictions[0], targets, weights)

    def check(predictions: Any, targets: Any, weights: Any) -> None:
        loss.check(_parts(predictions)[0], targets, weights)

    return Loss("with_state", forward, backward, reference, check, loss.has_targets)


def _nothing(leaf: Array) -> Array | None:
    """An error of zero; None where there is none at all."""
    return zeros_like(leaf, leaf.dtype) if is_floating(leaf) else None


def _parts(predictions: PyTree) -> tuple[Any, PyTree]:
    """Predictions and states.

    Raises:
        ValueError: if they are something else.
    """
    if not (isinstance(predictions, tuple) and len(predictions) == 2):
        raise ValueError(
            "with_state needs predictions (y, state), as a recurrent layer with return_state gives "
            f"them, got {type(predictions).__name__}"
        )
    return predictions
