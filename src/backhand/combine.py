"""Several objectives of one set of parameters, as one."""

import functools
import math
from collections.abc import Mapping

import jax
from jax import Array

from backhand.arrays import number
from backhand.gradients import Batch, Objective, Terms, check_objective
from backhand.metrics import Mean, Reduction, check_names
from backhand.protocol import split_key
from backhand.visit import Collect, Params, PyTree, Residuals, gradients, merged


def combine(objectives: Mapping[str, Objective], weights: Mapping[str, float]) -> Objective:
    """A weighted sum of objectives: loss = sum_i weight_i loss_i, each a mean over its own weight.

    The objectives share their parameters and the batch, of which each takes what it uses. Each
    keeps its own division, so that accumulation stays exact for all of them. Each loss is reported
    as a metric of its name, and their metrics as "name/metric".

    Args:
        objectives: by name; the first one's `init` makes the parameters.
        weights: by the same names, how much each counts.

    Raises:
        TypeError: for what is not an objective, or a weight that is not a number.
        ValueError: if there is none, the names differ, or one has a "/" or is that of something
            that a training step reports (`backhand.metrics.RESERVED`); for a weight that is not
            finite; when called, for a batch with a name that none uses; when collecting, for what
            does not add up over uses of a parameter, such as square norms.

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> model = bh.dense(1)
        >>> squared = bh.objective(model, bh.losses.mean_squared_error)
        >>> absolute = bh.objective(model, bh.losses.mean_absolute_error)
        >>> both = bh.combine({"l2": squared, "l1": absolute}, {"l2": 1.0, "l1": 0.1})
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = both.init(jax.random.key(0), batch)
        >>> bh.compare(both, params, batch).agrees
        True
    """
    if not objectives or objectives.keys() != weights.keys():
        raise ValueError(
            "combine needs objectives and a weight for each, by the same names; got "
            f"{list(objectives)} and {list(weights)}"
        )
    check_names(objectives)
    for name in objectives:
        if "/" in name:
            raise ValueError(f"combine needs names without '/', which joins metrics; got {name!r}")
    for name, objective in objectives.items():
        check_objective(objective)
        traced = isinstance(weights[name], jax.core.Tracer)
        if not traced and not math.isfinite(number(f"the weight of {name!r}", weights[name])):
            raise ValueError(f"the weight of {name!r} must be finite, got {weights[name]}")
    names = list(objectives)
    names_of = [objective.names for objective in objectives.values()]
    used = None if None in names_of else frozenset[str]().union(*filter(None, names_of))

    def part(objective: Objective, batch: Batch) -> Batch:
        """The batch without what only others use; what none uses stays, to be refused."""
        if used is None or objective.names is None or not isinstance(batch, Mapping):
            return batch
        others = used - objective.names
        return {name: leaf for name, leaf in batch.items() if name not in others}

    def init(key: Array, batch: Batch) -> Params:
        first = objectives[names[0]]
        return first.init(key, part(first, batch))

    def check(
        params: Params, batch: Batch, *, key: Array | None = None, training: bool = False
    ) -> None:
        for objective in objectives.values():
            objective.check(params, part(objective, batch), key=key, training=training)

    def forward(
        params: Params, batch: Batch, *, key: Array | None = None, training: bool = True
    ) -> tuple[Terms, Residuals]:
        totals, counts, residuals = {}, {}, {}
        metrics: dict[str, Reduction] = {}
        for index, name in enumerate(names):
            own = {"key": split_key(key, index), "training": training}
            objective = objectives[name]
            terms, residuals[name] = objective.forward(params, part(objective, batch), **own)
            totals[name] = jax.tree.map(lambda t, w=weights[name]: w * t, terms.total)
            counts[name] = terms.weight
            metrics |= {f"{name}/{metric}": value for metric, value in terms.metrics.items()}
            if len(jax.tree.leaves(terms.total)) == 1:
                metrics[name] = Mean(*jax.tree.leaves(terms[:2]))
        return Terms(totals, counts, metrics), residuals

    def backward(
        params: Params,
        residuals: Residuals,
        dtotal: PyTree,
        batch: Batch,
        collect: Collect = gradients,
        *,
        key: Array | None = None,
        training: bool = True,
    ) -> PyTree:
        each = []
        for index, name in enumerate(names):
            own = {"key": split_key(key, index), "training": training}
            error = jax.tree.map(lambda d, w=weights[name]: w * d, dtotal[name])
            objective = objectives[name]
            known = part(objective, batch)
            each.append(objective.backward(params, residuals[name], error, known, collect, **own))
        return functools.reduce(functools.partial(merged, collect), each)

    return Objective(init, forward, backward, check, objectives[names[0]].model, names=used)
