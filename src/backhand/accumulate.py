"""The gradient of a large batch from small ones, exactly.

A mean of micro-batch means is wrong as soon as the micro-batches weigh differently: masked, ragged.
Sums and weights add up instead, in float32, and are divided once. Where the weight of the whole
batch is known beforehand the division comes first, and each micro-batch goes back with the error
that it has in the whole batch: then whatever is collected, not only gradients, simply adds up.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from backhand.arrays import inverse, need_floating_dtype, whole_number
from backhand.contributions import map_owners
from backhand.foreign import of_sums
from backhand.gradients import Batch, Evaluate, Evaluation, Objective, Terms
from backhand.metrics import Sum
from backhand.micro_batches import Micro, columns, joined, like_given, over, stacked
from backhand.protocol import split_key
from backhand.visit import Collector, Params, PyTree, gradients
from backhand.waiting import (
    adding,
    by_identity,
    grouping,
    marked,
    unsummed,
    with_products,
    without_waiting,
)

Nonfinite: TypeAlias = Literal["keep", "drop"]


def accumulate(
    function: Evaluation | Callable[..., Any],
    micro_batches: int,
    *,
    weight: Callable[[PyTree], Array] | None = None,
    dtype: DTypeLike = jnp.float32,
    nonfinite: Nonfinite = "keep",
) -> Any:
    """The same loss and gradient, computed in micro-batches, in one scan.

    Equal to the whole batch's for any split, mask and weights, up to rounding. What couples the
    examples of a batch does so within each micro-batch: a batch norm's statistics, and the key, of
    which each gets its own. Micro-batch k holds examples k, k + K, k + 2K, ..., so that a batch
    sharded over devices stays where it is.

    Args:
        function: what `bh.value_and_grad` or `bh.value_and_collect` gives; or any function
            `(params, batch, ...) -> ((sum, weight), gradient of the sum)`, of any library. It
            changes nothing that it is given: what it did to a model would be lost.
        micro_batches: K. Of B examples the first B mod K micro-batches hold one more than the
            others; where B < K there are B of them.
        weight: for a function that gives `(mean, gradient of the mean)`: from a micro-batch, the
            weight of its mean. A mean alone cannot be accumulated exactly. Where the weight is 0
            the mean is not looked at. A negative weight counts as it is, here and in a pair: sums
            are divided by the sum of the weights.
        dtype: what sums run in, at least: of what has more bits they run in that.
        nonfinite: "drop" leaves out a micro-batch whose loss, weight or gradient has a NaN or Inf,
            with its weight and metrics; their number is the metric "dropped". Of a loss of several
            terms it takes a reverse pass for each. "keep" lets it through.

    Returns:
        An evaluation for an evaluation; else a function `(params, batch, *, key=None, ...) ->
        (mean, gradient)`, to be jitted with what surrounds it. A `key` is split. Both have
        `evaluate`, of the same arguments, which gives the metrics too: `terms, gradient =
        accumulated.evaluate(params, batch)`, then `terms.measured()["dropped"]`.

    Raises:
        TypeError: for something that cannot be called; when called, for a function that gives
            something else, or that changes what it is given, as a Flax NNX model with dropout is.
        ValueError: if K < 1, for a `dtype` that is not a floating-point one or has more bits than
            JAX is set to, or an evaluation that drops already; when called, for arrays of different
            lengths, for "drop" with what is not known to follow the error, or for gradients that do
            not have the shapes of the parameters.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> value, grads = bh.accumulate(bh.value_and_grad(loss), 2)(params, batch)
    """
    check_settings("accumulate", function, micro_batches, weight, dtype, nonfinite)
    if not isinstance(function, Evaluation):
        drop = nonfinite == "drop"
        return of_sums(function, micro_batches, weight, dtype, drop)
    if micro_batches == 1 and nonfinite == "keep":
        return function
    return _of_evaluation(function, micro_batches, dtype, nonfinite)


def check_settings(
    name: str,
    function: Any,
    micro_batches: int,
    weight: Callable[[PyTree], Array] | None,
    dtype: DTypeLike,
    nonfinite: str,
) -> None:
    """Refuses what cannot be accumulated.

    Raises:
        TypeError: for something that cannot be called, a weight that cannot or is beside an
            evaluation, or a number of micro-batches that is not whole.
        ValueError: for less than 1 micro-batch, an unknown choice, a dtype that sums cannot run
            in, or an evaluation that leaves out micro-batches already.
    """
    if not callable(function) or isinstance(function, Objective):
        raise TypeError(
            f"{name} needs a function that gives gradients, such as bh.value_and_grad(objective); "
            f"got {function!r}"
        )
    if whole_number(f"{name}'s number of micro-batches", micro_batches) < 1:
        raise ValueError(f"{name} needs at least 1 micro-batch, got {micro_batches}")
    if nonfinite not in ("keep", "drop"):
        raise ValueError(f"nonfinite must be 'keep' or 'drop', got {nonfinite!r}")
    need_floating_dtype(dtype)
    if weight is not None and not callable(weight):
        raise TypeError(f"weight must be a function of a micro-batch, got {weight!r}")
    if weight is not None and isinstance(function, Evaluation):
        raise TypeError("weight is for other functions: an evaluation knows the weight of its mean")
    drops = isinstance(function, Evaluation) and function.drops
    if drops and (name == "accumulate" or nonfinite == "drop"):
        raise ValueError(
            f"{name} needs an evaluation that leaves nothing out, for it divides by the weight of "
            "the whole batch: give nonfinite='drop' to this accumulation alone, the outer one"
        )


def _of_evaluation(
    evaluation: Evaluation, micro_batches: int, dtype: DTypeLike, nonfinite: Nonfinite
) -> Evaluation:
    """`accumulate` of an evaluation, each micro-batch scaled by the weight of the whole batch."""
    axes = {name: getattr(c, "batch_axis", None) for name, c in evaluation.collectors.items()}
    drop = nonfinite == "drop"

    def evaluate(
        params: Params,
        batch: Batch,
        *,
        scale: PyTree = None,
        key: Array | None = None,
        training: bool = True,
    ) -> tuple[Terms, dict[str, PyTree]]:
        split, divides = columns(batch, micro_batches), scale is None

        def weights(part: Batch, *_: Any) -> Micro:
            terms, _ = evaluation.objective.forward(params, part, key=key, training=training)
            return Micro((), (), terms.weight)  # a function of the batch: the rest is dead code

        if divides and drop:
            each = stacked(over(weights, batch, micro_batches).own)
            scale = jax.tree.map(lambda w: inverse(jnp.sum(w, 0, where=jnp.isfinite(w))), each)
        elif divides:
            scale = jax.tree.map(inverse, weights(batch).own)
        apart = drop and divides and len(jax.tree.leaves(scale)) > 1
        steered = None if apart else steered_gradients(evaluation)

        def reverse(how: Collector, part: Batch, index: Any) -> tuple[Terms, dict[str, PyTree]]:
            run = by_term(evaluation) if apart else evaluation.evaluate
            if steered is not None:
                run = steered.collecting(how)
            own = split_key(key, index)
            return run(params, part, scale=scale, key=own, training=training)

        group = 1
        if steered is not None:
            waiting = adding({}, waiting=True)
            likes = [
                jax.eval_shape(lambda part=part: reverse(waiting, part, 0)[1][steered.name])
                for part in split.sizes()
            ]
            same = len({jax.tree.structure(like) for like in likes}) == 1
            group = grouping(params, likes[0]) if same else 1

        def one(part: Batch, index: Any, sums: PyTree) -> Micro:
            how = adding({}, group > 1)
            if steered is not None and sums is not None:
                own_sums = by_identity(params, sums[-1][steered.name])
                how = unsummed(group > 1) if drop else adding(own_sums, group > 1)
            terms, collected = reverse(how, part, index)
            waiting = ()
            if steered is not None:
                grads = collected[steered.name]
                if group > 1:
                    waiting, grads = without_waiting(params, grads)
                collected = {**collected, steered.name: marked(params, grads)}
            added = {name: tree for name, tree in collected.items() if axes[name] is None}
            own = {name: tree for name, tree in collected.items() if axes[name] is not None}
            metrics = {name: metric.wide(dtype) for name, metric in terms.metrics.items()}
            return Micro((terms.total, terms.weight, added), waiting, (metrics, own))

        summed = params if group > 1 else ()
        whole = over(one, batch, micro_batches, summed, group, dtype=dtype, drop=drop)
        (loss, weight, collected), like = whole.sums, whole.like
        if steered is not None and group > 1:
            of_products = map_owners(lambda p, c: None if c is None else p, params, whole.products)
            for trees, products in ((collected, whole.products), (like[-1], of_products)):
                trees[steered.name] = with_products(params, trees[steered.name], products)
        for name, axis in axes.items():
            if axis is not None:
                runs = [own[name] for _, own in whole.own]
                like[-1][name] = collected[name] = jax.tree.map(
                    lambda *runs, axis=axis: joined(runs, axis), *runs
                )
        if drop and divides:
            divide = of_terms if apart else rescaled
            collected = divide(evaluation.collectors, collected, scale, weight)
        each = stacked([metrics for metrics, _ in whole.own])
        metrics = {name: m.combine(whole.fine if drop else None) for name, m in each.items()}
        if drop:
            metrics["dropped"] = Sum(jnp.sum(~whole.fine, dtype=jnp.int32))
        loss, weight, collected = like_given((loss, weight, collected), like)
        return Terms(loss, weight, metrics), {name: collected[name] for name in axes}

    jitted = jax.jit(evaluate, static_argnames="training")
    return dataclasses.replace(evaluation, evaluate=jitted, collecting=None, drops=drop)


class Steered(NamedTuple):
    """An evaluation of gradients that may be collected in another way.

    Attributes:
        name: of the gradients among what is collected.
        collecting: from a collector in the place of theirs to the reverse pass with it.
    """

    name: str
    collecting: Callable[[Collector], Evaluate]


def steered_gradients(evaluation: Evaluation) -> Steered | None:
    """How an evaluation's gradients are collected in another way; None if they are not."""
    collectors, collecting = evaluation.collectors, evaluation.collecting
    name = next((name for name, c in collectors.items() if c is gradients), None)
    if name is None or collecting is None:
        return None
    return Steered(name, lambda how: collecting({**collectors, name: how}))


def by_term(evaluation: Evaluation) -> Evaluate:
    """The reverse pass of each term of a loss alone: what is collected has them as its first axis.

    So each can still be divided by another weight, at the price of a reverse pass for each.

    Raises:
        ValueError: for examples that are clipped, whose norm is that of all terms together.
    """
    if not evaluation.adds_up:
        raise ValueError(
            "an example's gradient over several terms of a loss is clipped as a whole, which takes "
            "the weights of the terms beforehand: they are unknown where micro-batches may be "
            "dropped, or are still to come; use nonfinite='skip' in bh.train_step, and "
            "bh.accumulate for a batch that is there as a whole"
        )

    def run(
        params: Params, batch: Batch, *, scale: PyTree, **given: Any
    ) -> tuple[Terms, dict[str, PyTree]]:
        structure: Any
        leaves, structure = jax.tree.flatten(scale)
        alone = jnp.eye(len(leaves), dtype=bool)
        errors = [jnp.where(alone[i], leaf, jnp.zeros_like(leaf)) for i, leaf in enumerate(leaves)]
        return jax.vmap(
            lambda error: evaluation.evaluate(params, batch, scale=error, **given),
            out_axes=(None, 0),
        )(structure.unflatten(errors))

    return run


def rescaled(
    collectors: Mapping[str, Any], collected: dict[str, PyTree], scale: PyTree, weight: PyTree
) -> dict[str, PyTree]:
    """What was collected of a loss of one term under the error `scale`, as under one over `weight`.

    Raises:
        ValueError: for a collector that does not say how it follows the error
            (`Collector.degree`).
    """
    (old,), (new,) = jax.tree.leaves(scale), jax.tree.leaves(weight)
    factor = inverse(old * new)
    result = {}
    for name, tree in collected.items():
        degree = getattr(collectors[name], "degree", None)
        if degree is None:
            raise ValueError(
                f"{name}: a collector whose weight is not known beforehand needs a degree: "
                "bh.Collector(read, degree=1) for one that is linear in the error, as gradients are"
            )
        result[name] = jax.tree.map(
            lambda leaf, power=degree: leaf * (factor**power).astype(leaf.dtype), tree
        )
    return result


def of_terms(
    collectors: Mapping[str, Any], collected: dict[str, PyTree], scale: PyTree, weight: PyTree
) -> dict[str, PyTree]:
    """What the whole loss collects over its weights, from what `by_term` did under `scale`.

    Raises:
        ValueError: for a collector that does not add up over the terms of a loss.
    """
    factors = [
        inverse(old * new)
        for old, new in zip(jax.tree.leaves(scale), jax.tree.leaves(weight), strict=True)
    ]

    def divided(leaf: Array) -> Array:
        terms = [f.astype(leaf.dtype) * leaf[i] for i, f in enumerate(factors)]
        return functools.reduce(jnp.add, terms)

    result = {}
    for name, tree in collected.items():
        degree = getattr(collectors[name], "degree", None)
        if degree not in (0, 1):
            raise ValueError(
                f"{name}: what is collected of a loss of several terms, whose weights are not "
                "known beforehand, must add up over the terms, as gradients and statistics do"
            )
        result[name] = jax.tree.map(divided if degree else lambda leaf: leaf[0], tree)
    return result
