"""Several objectives of one set of parameters, as one."""

import functools
from collections.abc import Mapping

import jax
from jax import Array

from backhand.gradients import Batch, Objective, Terms
from backhand.metrics import Mean, Reduction, check_names
from backhand.protocol import split_key
from backhand.visit import Collect, Params, PyTree, Residuals, gradients, merged


def combine(objectives: Mapping[str, Objective], weights: Mapping[str, float]) -> Objective:
    """A weighted sum of objectives: loss = sum_i weight_i loss_i, each a mean over its own weight.

    The objectives share their parameters and the batch. Each keeps its own division, so that
    accumulation stays exact for all of them. Each loss is reported as a metric of its name, and
    their metrics as "name/metric".

    Args:
        objectives: by name; the first one's `init` makes the parameters.
        weights: by the same names, how much each counts.

    Raises:
        ValueError: if there is none, the names differ, or one has a "/" or is that of something
            that a training step reports (`backhand.metrics.RESERVED`); when collecting, for what
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
    names = list(objectives)

    def check(
        params: Params, batch: Batch, *, key: Array | None = None, training: bool = False
    ) -> None:
        for objective in objectives.values():
            objective.check(params, batch, key=key, training=training)

    def forward(
        params: Params, batch: Batch, *, key: Array | None = None, training: bool = True
    ) -> tuple[Terms, Residuals]:
        totals, counts, residuals = {}, {}, {}
        metrics: dict[str, Reduction] = {}
        for index, name in enumerate(names):
            own = {"key": split_key(key, index), "training": training}
            terms, residuals[name] = objectives[name].forward(params, batch, **own)
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
            each.append(
                objectives[name].backward(params, residuals[name], error, batch, collect, **own)
            )
        return functools.reduce(functools.partial(merged, collect), each)

    first = objectives[names[0]]
    return Objective(first.init, forward, backward, check, first.model)
