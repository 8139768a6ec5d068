"""The reverse pass of a step: gradients of what is learned, statistics, the loss scale."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from backhand.accumulate import accumulate
from backhand.arrays import inverse, is_floating
from backhand.clipping import value_and_clipped_grad
from backhand.collectors import statistics
from backhand.contributions import map_owners
from backhand.gradients import (
    Batch,
    Evaluate,
    Evaluation,
    Objective,
    Terms,
    check_objective,
    value_and_collect,
    value_and_grad,
)
from backhand.metrics import check_names
from backhand.training.clip import scaled
from backhand.training.state import learned
from backhand.visit import Collect, Params, PyTree, Residuals, gradients

COLLECTORS: Mapping[str, Collect] = {"gradients": gradients, "statistics": statistics}

Way = Literal["manual", "automatic"]


class Found(NamedTuple):
    """What a reverse pass finds.

    Attributes:
        loss: the mean loss ().
        gradients: in the tree of the parameters, zeros for those that are not learned.
        statistics: what running statistics saw, for `merge_statistics`.
        dropped: how many micro-batches were left out, int32 ().
        metrics: what is reported of it.
    """

    loss: Array
    gradients: PyTree
    statistics: PyTree
    dropped: Array
    metrics: dict[str, PyTree]


def reverse_pass(
    objective: Objective,
    *,
    way: Way,
    micro_batches: int,
    clip_example_norm: float | None,
    frozen: Sequence[str],
    drop: bool,
) -> Callable[..., Found]:
    """`(params, batch, key, loss_scale) -> Found`, the settings those of `train_step`."""
    check_objective(objective)
    objective = _named(objective)
    evaluation = _evaluation(objective, way, clip_example_norm, frozen)
    accumulated = functools.partial(
        accumulate, micro_batches=micro_batches, nonfinite="drop" if drop else "keep"
    )
    plain = accumulated(evaluation).evaluate

    def reverse(
        params: Params, batch: dict[str, PyTree], key: Array | None, loss_scale: Array | None
    ) -> Found:
        if loss_scale is None:
            terms, found = plain(params, batch, key=key)
        else:
            terms, found = accumulated(_times(evaluation, loss_scale)).evaluate(
                params, batch, key=key
            )
            found = {**found, "gradients": scaled(found["gradients"], 1 / loss_scale)}
        loss, measured = terms.mean(), terms.measured()
        empty = jnp.stack([w == 0 for w in jax.tree.leaves(terms.weight)])
        return Found(
            loss,
            found["gradients"],
            found["statistics"],
            measured["dropped"] if drop else jnp.zeros((), jnp.int32),
            {"loss": loss, "empty": jnp.sum(empty, dtype=jnp.int32), **measured},
        )

    return reverse


def as_function(
    reverse: Callable[..., Found],
    batch: dict[str, PyTree],
    key: Array | None,
    loss_scale: Array | None,
    dropped: Array,
) -> Callable[[Params], Array]:
    """The loss that a reverse pass finds as a function of the parameters, with its gradient.

    For update rules that look for the length of a step: they see what the step sees, in as little
    memory. It is infinite where more would be left out than `dropped`, or a step that overflows
    everything would be the best. Differentiated backwards only.
    """

    def run(params: Params) -> Found:
        found = reverse(params, batch, key, loss_scale)
        return found._replace(loss=jnp.where(found.dropped > dropped, jnp.inf, found.loss))

    def forward(params: Params) -> tuple[Array, PyTree]:
        found = run(params)
        return found.loss, found.gradients

    def backward(grads: PyTree, error: Array) -> tuple[PyTree]:
        return (scaled(grads, error),)

    loss_of = jax.custom_vjp(lambda params: run(params).loss)
    loss_of.defvjp(forward, backward)
    return loss_of


def _evaluation(
    objective: Objective, way: Way, clip_example_norm: float | None, frozen: Sequence[str]
) -> Evaluation:
    """Gradients of what is learned, and running statistics, in one pass either way.

    The others' gradients are left out before anything reads them, so the compiler drops their work.
    Beside automatic gradients the statistics come from the hand-written reverse: they do not depend
    on the errors, so the compiler drops the rest of it.
    """

    def mask(params: Params) -> PyTree:
        return learned(params, frozen)

    automatic = value_and_grad(objective, gradients=way)
    if clip_example_norm is not None:
        if way != "manual":
            raise ValueError("clip_example_norm needs the hand-written reverse: gradients='manual'")
        return value_and_clipped_grad(objective, clip_example_norm, mask=mask)
    manual = value_and_collect(objective, **COLLECTORS)
    forward = value_and_collect(objective, statistics=statistics)

    def learned_only(evaluate: Evaluate) -> Evaluate:
        def masked(params: Params, batch: Batch, **given: Any) -> tuple[Terms, dict[str, PyTree]]:
            terms, found = evaluate(params, batch, **given)
            grads = map_owners(_unless_fixed, params, found["gradients"], mask(params))
            return terms, {**found, "gradients": grads}

        return masked

    def both(params: Params, batch: Batch, **given: Any) -> tuple[Terms, dict[str, PyTree]]:
        terms, found = automatic.evaluate(params, batch, **given)
        return terms, found | forward.evaluate(params, batch, **given)[1]

    if way == "automatic":
        return dataclasses.replace(manual, evaluate=learned_only(both), collecting=None)
    steered = manual.collecting
    return dataclasses.replace(
        manual,
        evaluate=learned_only(manual.evaluate),
        collecting=steered and (lambda collectors: learned_only(steered(collectors))),
    )


def _times(evaluation: Evaluation, factor: Array) -> Evaluation:
    """The evaluation, every error that goes back multiplied by a factor."""

    def louder(evaluate: Evaluate) -> Evaluate:
        def run(
            params: Params, batch: Batch, *, scale: PyTree = None, **given: Any
        ) -> tuple[Terms, dict[str, PyTree]]:
            if scale is None:  # the weight is a function of the batch: the rest is dead
                terms, _ = evaluation.objective.forward(params, batch, **given)
                scale = jax.tree.map(inverse, terms.weight)
            scale = jax.tree.map(lambda s: factor.astype(s.dtype) * s, scale)
            return evaluate(params, batch, scale=scale, **given)

        return run

    collecting = evaluation.collecting
    return dataclasses.replace(
        evaluation,
        evaluate=louder(evaluation.evaluate),
        collecting=collecting and (lambda collectors: louder(collecting(collectors))),
    )


def _named(objective: Objective) -> Objective:
    """The objective, whose metrics are refused if they have names that the step itself uses."""

    def forward(*args: Any, **given: Any) -> tuple[Terms, Residuals]:
        terms, residuals = objective.forward(*args, **given)
        check_names(terms.metrics)
        return terms, residuals

    return dataclasses.replace(objective, forward=forward)


def _unless_fixed(param: PyTree, gradient: PyTree, learns: PyTree) -> PyTree:
    """A parameter's gradient, or its contribution; zeros for one that does not learn."""
    if all(jax.tree.leaves(learns)):
        return gradient
    return jax.tree.map(lambda p: jnp.zeros_like(p) if is_floating(p) else None, param)
