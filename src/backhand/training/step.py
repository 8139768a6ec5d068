"""One step of training: forward, loss, backward, update."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import optax
from jax import Array

from backhand.accumulate import accumulate as in_micro_batches
from backhand.collectors import merge_statistics, statistics
from backhand.gradients import (
    Batch,
    Evaluation,
    Objective,
    Terms,
    value_and_collect,
    value_and_grad,
)
from backhand.training.state import TrainState, learning
from backhand.visit import Params, PyTree
from backhand.visit import gradients as gradient

Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    gradients: Literal["manual", "automatic"] = "manual",
) -> Step:
    """A jitted step `(state, batch) -> (state, metrics)`.

    The state is donated: use the one that comes back. Compiled once for each shape of batch.

    Args:
        objective: what to minimize.
        optimizer: any Optax update rule, the one that the state was made with. Rules that ask for
            them get the loss (`value`), the gradient (`grad`) and the objective (`value_fn`).
        accumulate: the number of micro-batches that a batch is computed in.
        gradients: "manual" for the hand-written reverse pass, "automatic" for `jax.grad`.

    Returns:
        The step. Its metrics are device scalars: "loss", "gradient_norm", and the objective's.

    Raises:
        TypeError: if the optimizer is not an Optax update rule.
        ValueError: for another kind of gradients, fewer than 1 micro-batch or, when called, a batch
            that the objective refuses; before anything compiles.

    Example:
        >>> import backhand as bh, jax.numpy as jnp, optax
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> state = bh.train_state(params, optax.adam(1e-3))
        >>> step = bh.train_step(loss, optax.adam(1e-3))
        >>> state, metrics = step(state, batch)
        >>> int(state.step), sorted(metrics)
        (1, ['gradient_norm', 'loss'])
    """
    learning(optimizer, ())
    evaluate = in_micro_batches(_evaluation(objective, gradients), accumulate).evaluate

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        terms, collected = evaluate(state.params, batch, key=key)
        loss, grads = terms.mean(), collected["gradients"]
        with jax.numpy_dtype_promotion("standard"):  # Optax's rules mix dtypes
            updates, opt_state = learning(optimizer, state.params).update(
                grads,
                state.opt_state,
                state.params,
                value=loss,
                grad=grads,
                value_fn=lambda params: objective(params, batch, key=key),
            )
            params = optax.apply_updates(state.params, updates)
        params = merge_statistics(params, collected["statistics"])
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **terms.measured()}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    compiled = jax.jit(run, donate_argnums=0)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        objective.check(state.params, batch)
        return compiled(state, dict(batch))

    step.compiled = compiled  # type: ignore[attr-defined]
    return step


def _evaluation(objective: Objective, gradients: Literal["manual", "automatic"]) -> Evaluation:
    """Gradients and running statistics, in one pass either way.

    The statistics come from the hand-written reverse: they do not depend on the errors, so the
    compiler drops the rest of it.
    """
    manual = value_and_collect(objective, gradients=gradient, statistics=statistics)
    if gradients == "manual":
        return manual
    automatic = value_and_grad(objective, gradients=gradients)
    forward = value_and_collect(objective, statistics=statistics)

    def evaluate(params: Params, batch: Batch, **given: Any) -> tuple[Terms, dict[str, PyTree]]:
        terms, collected = automatic.evaluate(params, batch, **given)
        return terms, collected | forward.evaluate(params, batch, **given)[1]

    return dataclasses.replace(manual, evaluate=evaluate)
