"""Gradients whose every example has a bounded say, from one reverse pass.

    g = (1 / W) sum_b min(1, c / |g_b|) g_b

with g_b the gradient of example b's own loss, times its weight, and W the sum of the weights. The
norms must be known before the sum, so autodiff goes back twice, or keeps every g_b. Here the
contributions of the one pass wait unsummed: x and dy of each weight give first |g_b|, then, with dy
scaled by the factor of its example, the clipped sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import inverse
from backhand.collectors import per_example_norms, statistics
from backhand.contributions import has_examples, inner_products, map_owners, scaled, total
from backhand.gradients import Batch, Evaluation, Objective, Terms, value_and_collect
from backhand.metrics import Mean
from backhand.visit import Collector, Params, PyTree, gradients

contributions = Collector(lambda visit: visit.contributions)


def value_and_clipped_grad(
    objective: Objective, max_norm: float, *, mask: Callable[[Params], PyTree] | None = None
) -> Evaluation:
    """The loss, and its gradient with every example's own clipped to a norm.

    An evaluation, so it can be accumulated. The metric "clipped" is the share of examples that
    were.

    Args:
        objective: what to differentiate; a loss of one term, and layers whose rules leave
            parameters' cotangents unsummed (`Outer`, `Total`, `Rows`).
        max_norm: c, above 0: of each example's own gradient, before the division by W, so W times
            what `per_example_norms` gives.
        mask: from the parameters, True for each that is trained; the others have a gradient of 0
            and no part in the norms. None trains all.

    Raises:
        ValueError: if c is not above 0, or the loss has several terms.
        TypeError: when called, for a layer whose rule gives plain arrays.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> value, grads = bh.value_and_clipped_grad(loss, 0.1)(params, batch)
        >>> bool(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))) < 0.1001)
        True

    References:
        Abadi et al., "Deep learning with differential privacy", 2016.
        Li et al., "Large language models can be strong differentially private learners", 2021.
    """
    if not max_norm > 0:
        raise ValueError(f"an example's gradient is clipped to a norm above 0, got {max_norm}")
    unsummed = value_and_collect(objective, contributions=contributions, statistics=statistics)

    def evaluate(
        params: Params,
        batch: Batch,
        *,
        scale: PyTree = None,
        key: Array | None = None,
        training: bool = True,
    ) -> tuple[Terms, dict[str, PyTree]]:
        terms, collected = unsummed.evaluate(params, batch, scale=scale, key=key, training=training)
        if len(jax.tree.leaves(terms.weight)) != 1:
            raise ValueError("clipping by example needs a loss of one term")
        (error,) = jax.tree.leaves(jax.tree.map(inverse, terms.weight) if scale is None else scale)
        trained = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        uses = map_owners(
            lambda _, c, kept: c if has_examples(c) and kept is True else None,
            params,
            collected["contributions"],
            trained,
        )
        squares = map_owners(
            lambda p, c: jnp.zeros(()) if c is None else inner_products(c, c, p), params, uses
        )
        norms = per_example_norms(squares) * inverse(error)
        factors = max_norm / jnp.maximum(norms, max_norm)
        grads = map_owners(
            lambda p, c: total(None if c is None else scaled(c, factors, p), p), params, uses
        )
        seen = (factors < 1, norms > 0)
        clipped = Mean(*(jnp.sum(which, dtype=jnp.float32) for which in seen))
        terms = terms._replace(metrics={**terms.metrics, "clipped": clipped})
        return terms, {"gradients": grads, "statistics": collected["statistics"]}

    collectors = {"gradients": gradients, "statistics": statistics}
    return Evaluation(objective, evaluate, collectors, "gradients")
