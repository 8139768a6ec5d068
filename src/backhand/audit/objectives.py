"""Hand-written against automatic gradients of one objective, leaf by leaf."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand.audit.functions import Way, compare_ways
from backhand.audit.inputs import check_arguments
from backhand.audit.order import in_model_order
from backhand.audit.report import Report
from backhand.audit.subject import Subject
from backhand.gradients import Batch, Objective, value_and_grad
from backhand.visit import Params


def compare_objective(
    objective: Objective,
    params: Params,
    batch: Batch,
    given: Mapping[str, Any],
    rtol: float | None,
) -> Report:
    """`bh.compare(objective, params, batch)`: the hand-written gradient beside `jax.grad`'s.

    Args:
        objective: to compare.
        params: its parameters.
        batch: its batch.
        given: key and training.
        rtol: another tolerance.
    """
    check_arguments("objective", (params, batch), ("params", "batch"))
    objective.check(params, batch, **given)
    params, batch = jax.tree.map(jnp.asarray, (params, dict(batch)))

    def manual(params: Params, batch: Batch) -> Any:
        return value_and_grad(objective)(params, batch, **given)

    def automatic(params: Params, batch: Batch) -> Array:
        return objective(params, batch, **given)

    ways = Way("manual", manual, "value and gradient"), Way("automatic", automatic, "value")
    order = tuple(path for path, _ in in_model_order(objective.model, params))
    subject = Subject(
        "objective", automatic, (params, batch), ("", "batch"), held=frozenset({1}), order=order
    )
    return compare_ways(ways, subject, rtol)
