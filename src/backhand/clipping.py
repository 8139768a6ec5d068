"""Gradients whose every example has a bounded say, from one reverse pass.

    g = (1 / W) sum_b min(1, c / |g_b|) g_b

with g_b the gradient of example b's own loss, times its weight, and W the sum of the weights: what
is clipped is weight times gradient. The norms must be known before the sum, so autodiff goes back
twice, or keeps every g_b. Here the contributions of the one pass wait unsummed: x and dy of each
weight give first |g_b|, then, with dy scaled by the factor of its example, the clipped sum.

Of a loss of several terms, each divided by its own weight W_t, g_b is sum_t (W / W_t) g_bt, and W
the largest W_t: the weight that they have in common, where they do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import inverse, number
from backhand.collectors import per_example_norms, square_norms, statistics
from backhand.contributions import (
    Contribution,
    has_examples,
    inner_products,
    is_contribution,
    map_owners,
    scaled,
    total,
)
from backhand.gradients import Batch, Evaluation, Objective, Terms, value_and_collect
from backhand.metrics import Mean
from backhand.visit import Collector, Params, PyTree, Visit, contributions, gradients


def value_and_clipped_grad(
    objective: Objective, max_norm: float, *, mask: Callable[[Params], PyTree] | None = None
) -> Evaluation:
    """The loss, and its gradient with every example's own clipped to a norm.

        g = (1 / W) sum_i min(w_i, c / |g_i|) g_i

    with g_i the gradient of example i's loss, w_i its weight, and W the sum of the weights: an
    example of twice the weight is clipped at half the gradient, and moves the mean by c / W at
    most. That holds where an example's loss is a function of that example alone. Where examples
    meet, in batch norm or a contrastive loss, g_i is what reaches the parameters by example i's
    values, and no bound on what the example changes: do not rely on it for privacy.

    An evaluation, so it can be accumulated. The metric "clipped" is the share of examples with
    w_i |g_i| > c, of those with a gradient at all.

    Args:
        objective: what to differentiate. Where a layer's rule sums over the batch itself, rather
            than leave cotangents unsummed (`Outer`, `Total`, `Rows`), its norms are computed one
            example at a time, with a warning, and the model goes back twice.
        max_norm: c, above 0: of w_i g_i, before the division by W, so W times what
            `per_example_norms` gives. W is the weight of the batch; of a loss of several
            terms, the largest of theirs.
        mask: from the parameters, True for each that is trained; the others have a gradient of 0
            and no part in the norms. None trains all.

    Raises:
        ValueError: if c is not above 0; when called, for a layer whose rule sums, and whose
            residuals do not all have the batch as their first axis; when accumulated, for a loss
            of several terms whose weights are not known beforehand: with nonfinite="drop", and by
            `bh.accumulator`.
        TypeError: when called, for a layer whose rule sums in a `bh.combine` of objectives.

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
    if not number("the norm of an example", max_norm) > 0:
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
        given = {"scale": scale, "key": key, "training": training}
        terms, found = unsummed.evaluate(params, batch, **given)

        def again(collector: Collector) -> PyTree:
            """What is gathered in a reverse pass of its own."""
            alone = value_and_collect(objective, own=collector)
            return alone.evaluate(params, batch, **given)[1]["own"]

        errors = jax.tree.map(inverse, terms.weight) if scale is None else scale
        error = _smallest(jax.tree.leaves(errors))
        trained = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        uses = map_owners(
            lambda _, c, kept: c if has_examples(c) and kept is True else None,
            params,
            found["contributions"],
            trained,
        )
        leaves = jax.tree.leaves(uses, is_leaf=is_contribution)
        once = not any(isinstance(leaf, Array) for leaf in leaves)
        squares = map_owners(_squares, params, uses) if once else again(square_norms)
        squares = map_owners(
            lambda _, c, square: jnp.zeros(()) if c is None else square, params, uses, squares
        )
        norms = per_example_norms(squares) * inverse(error)
        factors = max_norm / jnp.maximum(norms, max_norm)
        grads = map_owners(_scaled_sum(factors), params, uses) if once else again(_scaling(factors))
        grads = map_owners(
            lambda p, c, grad: total(None, p) if c is None else grad, params, uses, grads
        )
        seen = (factors < 1, norms > 0)
        clipped = Mean(*(jnp.sum(which, dtype=jnp.float32) for which in seen))
        terms = terms._replace(metrics={**terms.metrics, "clipped": clipped})
        return terms, {"gradients": grads, "statistics": found["statistics"]}

    collectors = {"gradients": gradients, "statistics": statistics}
    return Evaluation(objective, evaluate, collectors, "gradients", adds_up=False)


def _smallest(errors: list[Array]) -> Array:
    """The error of the term with the largest weight; of one without weight it is 0."""
    if len(errors) == 1:
        return errors[0]
    stacked = jnp.stack(errors)
    smallest = jnp.min(stacked, where=stacked != 0, initial=jnp.inf)
    return jnp.where(jnp.any(stacked != 0), smallest, 0)


def _squares(param: PyTree, contribution: Contribution) -> Array | None:
    """Each example's square norm (B,); None where it learns nothing."""
    return None if contribution is None else inner_products(contribution, contribution, param)


def _scaled_sum(factors: Array) -> Callable[[PyTree, Contribution], PyTree]:
    """From a contribution to its gradient, each example's times its factor (B,)."""

    def gradient(param: PyTree, contribution: Contribution) -> PyTree:
        learns = has_examples(contribution)
        return total(scaled(contribution, factors, param) if learns else None, param)

    return gradient


def _scaling(factors: Array) -> Collector:
    """A collector of gradients, each example's times its factor (B,), for any kind of rule.

    One that sums over the batch runs once more, with the errors scaled before.
    """

    def read(visit: Visit) -> PyTree:
        leaves = jax.tree.leaves(visit.contributions, is_leaf=is_contribution)
        if not any(isinstance(leaf, Array) for leaf in leaves):
            return map_owners(_scaled_sum(factors), visit.params, visit.contributions)
        dy = jax.tree.map(
            lambda d: d * factors.astype(d.dtype).reshape(-1, *[1] * (d.ndim - 1)), visit.dy
        )
        return Visit(visit.params, visit.residuals, dy, visit.rule).dparams

    return Collector(read)
