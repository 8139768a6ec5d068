"""A loss with the balance of a mixture of experts beside it."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from backhand.arrays import is_floating, like_primal, upcast
from backhand.losses.common import weighted_sum, weighted_sum_backward
from backhand.protocol import Loss
from backhand.visit import PyTree


def with_balance(loss: Loss, coefficient: float = 0.01) -> Loss:
    """A loss of predictions (y, balance): `loss` of y, and a share of the mean balance.

    Two terms, "loss" and "balance", each a sum with a weight of its own, so that both are exact
    over micro-batches; the mean loss is L + coefficient mean_b balance_b. An example has the weight
    of its positions together, 1 where there are no weights. The error of the balance (B,) is
    coefficient w_b d(total).

    Args:
        loss: of y, targets and weights.
        coefficient: of the balance; 0.01 is the Switch transformer's.

    Raises:
        TypeError: for what is no loss.
        ValueError: for a negative coefficient; when run, for predictions that are not such a pair.

    Example:
        >>> import backhand as bh
        >>> loss = with_balance(bh.losses.mean_squared_error, 0.5)
        >>> totals, weights = loss((jnp.ones((2, 3)), jnp.array([1.0, 3.0])), jnp.zeros((2, 3)))
        >>> float(totals["loss"]), float(totals["balance"]), float(weights["balance"])
        (6.0, 2.0, 2.0)

        Metrics see the pair: one of y alone is a function of y[0].

        >>> def right(y, targets, weights=None):
        ...     return bh.metrics.accuracy(y[0], targets, weights)

    References:
        Fedus, Zoph and Shazeer, "Switch transformers", 2021.
    """
    if not isinstance(loss, Loss):
        raise TypeError(f"with_balance needs a loss such as bh.losses.huber, got {loss!r}")
    if not coefficient >= 0:
        raise ValueError(f"with_balance needs a coefficient of 0 or more, got {coefficient}")

    def terms(of_loss: PyTree, of_balance: PyTree) -> PyTree:
        pairs = zip(of_loss, of_balance, strict=True)
        return tuple({"loss": own, "balance": other} for own, other in pairs)

    def forward(predictions: PyTree, targets: PyTree, weights: Array | None = None) -> PyTree:
        y, balance = _parts(predictions)
        own, residuals = loss.forward(y, targets, weights)
        total, weight = weighted_sum("with_balance", upcast(balance), _by_example(weights))
        return terms(own, (coefficient * total, weight)), (residuals, balance, weights)

    def backward(residuals: PyTree, dy: PyTree) -> tuple[PyTree, PyTree, Array | None]:
        of_loss, balance, weights = residuals
        dtotal, dweight = dy
        dx, dtargets, dweights = loss.cotangents(of_loss, (dtotal["loss"], dweight["loss"]))
        error = coefficient * dtotal["balance"], dweight["balance"]
        each = _by_example(weights)
        dbalance, deach = weighted_sum_backward(upcast(balance), each, error)
        if weights is not None and deach is not None and is_floating(weights):
            deach = deach.reshape(deach.shape + (1,) * (weights.ndim - 1))
            more = like_primal(jnp.broadcast_to(deach, weights.shape), weights)
            dweights = more if dweights is None else dweights + more
        return (dx, like_primal(dbalance, balance)), dtargets, dweights

    def reference(predictions: PyTree, targets: PyTree, weights: Array | None = None) -> PyTree:
        y, balance = predictions
        balance = upcast(balance)
        each = jnp.ones_like(balance)
        if weights is not None:
            each = weights.astype(balance.dtype).sum(tuple(range(1, weights.ndim)))
        term = coefficient * (each * balance).sum(), each.sum()
        return terms(loss.reference(y, targets, weights), term)

    def check(predictions: Any, targets: Any, weights: Any) -> None:
        loss.check(_parts(predictions)[0], targets, weights)

    return Loss("with_balance", forward, backward, reference, check, loss.has_targets)


def _parts(predictions: PyTree) -> tuple[Any, Any]:
    """Predictions and balances.

    Raises:
        ValueError: if they are something else.
    """
    if not (isinstance(predictions, tuple) and len(predictions) == 2):
        raise ValueError(
            "with_balance needs predictions (y, balance), as a model with a mixture of experts "
            f"gives them, got {type(predictions).__name__}"
        )
    y, balance = predictions
    if len(balance.shape) != 1 or not is_floating(balance):
        raise ValueError(
            "with_balance needs a floating-point balance of shape (B,), one number for each "
            f"example, got {balance.dtype} of shape {balance.shape}"
        )
    return y, balance


def _by_example(weights: Array | None) -> Array | None:
    """The weight of each example (B,), in at least float32."""
    if weights is None:
        return None
    wide = upcast(weights) if is_floating(weights) else weights.astype(jnp.float32)
    return jnp.sum(wide, tuple(range(1, weights.ndim)))
