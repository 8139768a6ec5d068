"""Gradients from micro-batches that arrive one at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from backhand.accumulate import (
    Nonfinite,
    all_finite,
    as_sums,
    check_settings,
    rescaled,
    zeros,
)
from backhand.arrays import inverse
from backhand.gradients import Batch, Evaluation
from backhand.metrics import Reduction
from backhand.protocol import split_key
from backhand.visit import Params, PyTree


class Sums(NamedTuple):
    """What an accumulator has seen since its last `take`; a pytree, so it checkpoints.

    Attributes:
        total: the sum of the loss.
        weight: the sum of its weights.
        collected: the sums of what is collected, in float32.
        metrics: the metrics so far.
        added: how many micro-batches were added, int32 ().
        dropped: how many of them were left out for a NaN or Inf, int32 ().
    """

    total: Array
    weight: Array
    collected: PyTree
    metrics: dict[str, Reduction]
    added: Array
    dropped: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """Adds up gradients of micro-batches on the device; made by `accumulator`.

    Args:
        every: how many micro-batches make a window.
        init: `(params, batch, *, key=None) -> Sums`, empty; from the shapes of a micro-batch, and
            with a key for a function that needs one.
        add: `(sums, params, batch, *, key=None) -> Sums`, jitted; donates `sums`. Each micro-batch
            of a window gets a key of its own from `key`.
        divide: `Sums -> (loss, gradient or what is collected)`, jitted.
    """

    every: int
    init: Callable[..., Sums]
    add: Callable[..., Sums]
    divide: Callable[[Sums], tuple[Array, PyTree]]

    def ready(self, sums: Sums) -> bool:
        """Whether a window is full; waits for the device to have counted."""
        return int(sums.added) >= self.every

    def take(self, sums: Sums, *, partial: bool = False) -> tuple[tuple[Array, PyTree], Sums]:
        """The mean loss and gradient of what was added, and empty sums for the next window.

        Args:
            sums: of a full window.
            partial: True to apply a window that is not full, at the end of an epoch for instance;
                to carry it over instead, go on adding.

        Raises:
            ValueError: for an empty window, or a partial one unless `partial`.
        """
        count = int(sums.added)
        if count == 0 or (count < self.every and not partial):
            raise ValueError(
                f"take needs a full window of {self.every} micro-batches, got {count}; add more, "
                "or apply what there is with partial=True"
            )
        return self.divide(sums), jax.tree.map(jnp.zeros_like, sums)

    def measured(self, sums: Sums) -> dict[str, Array]:
        """The metrics of what was added so far."""
        return {name: metric.value() for name, metric in sums.metrics.items()}


def accumulator(
    function: Evaluation | Callable[..., Any],
    every: int,
    *,
    weight: Callable[[Batch], Array] | None = None,
    dtype: DTypeLike = jnp.float32,
    nonfinite: Nonfinite = "keep",
) -> Accumulator:
    """`bh.accumulate` for micro-batches that arrive one at a time from the host.

    Exact for any mask and weights: a micro-batch of fewer examples, or of less weight, counts less.

    Args:
        function: as for `bh.accumulate`; an evaluation's loss has one term, and its collectors a
            degree.
        every: how many micro-batches make a window.
        weight: as for `bh.accumulate`.
        dtype: what sums run in, and what the gradient comes back in.
        nonfinite: as for `bh.accumulate`.

    Raises:
        TypeError: for something that cannot be called.
        ValueError: for a window of less than 1 micro-batch; when first used, for a loss of several
            terms, a collector that has no sum, or sums that another model's `init` made.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> window = bh.accumulator(bh.value_and_grad(loss), every=2)
        >>> sums = window.init(params, batch)
        >>> while not window.ready(sums):
        ...     sums = window.add(sums, params, batch)
        >>> (value, grads), sums = window.take(sums)
    """
    check_settings("accumulator", function, every, weight, nonfinite)
    one = (
        _of_evaluation(function) if isinstance(function, Evaluation) else _of_sums(function, weight)
    )

    def init(params: Params, batch: Batch, *, key: Array | None = None) -> Sums:
        if isinstance(function, Evaluation):
            function.objective.check(params, batch)
        (total, w, collected), metrics = jax.eval_shape(one, params, dict(batch), key)
        total, w, collected = jax.tree.map(lambda leaf: zeros(leaf, dtype), (total, w, collected))
        metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
        counts = (jnp.zeros((), jnp.int32) for _ in range(2))
        return Sums(total, w, collected, metrics, *counts)

    def add(sums: Sums, params: Params, batch: Batch, key: Array | None) -> Sums:
        new, metrics = one(params, batch, split_key(key, sums.added))
        fine = all_finite(new) if nonfinite == "drop" else jnp.ones((), bool)
        if nonfinite == "drop":
            new = jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros_like(x)), new)
        total, w, collected = jax.tree.map(
            lambda total, x: total + x.astype(total.dtype), tuple(sums[:3]), new
        )
        kept = jnp.stack([sums.added > sums.dropped, fine])
        both = jax.tree.map(lambda *parts: jnp.stack(parts), sums.metrics, metrics)
        joined = {name: metric.combine(kept) for name, metric in both.items()}
        bad = 1 - fine.astype(jnp.int32)
        return Sums(total, w, collected, joined, sums.added + 1, sums.dropped + bad)

    def divide(sums: Sums) -> tuple[Array, PyTree]:
        loss = sums.total * inverse(sums.weight)
        if not isinstance(function, Evaluation):
            factor = inverse(sums.weight)
            return loss, jax.tree.map(lambda g: g * factor.astype(g.dtype), sums.collected)
        ones = jnp.ones_like(sums.weight)
        result = rescaled(function.collectors, sums.collected, ones, sums.weight)
        return loss, result if function.alone is None else result[function.alone]

    jitted = jax.jit(add, donate_argnums=0)
    known: set[Any] = set()

    def checked_add(sums: Sums, params: Params, batch: Batch, *, key: Array | None = None) -> Sums:
        if isinstance(function, Evaluation):
            function.objective.check(params, batch, key=key, training=True)
        met = _shapes((sums, params))
        if met not in known:
            expected = jax.eval_shape(lambda: init(params, batch, key=key))
            if _shapes(sums) != _shapes(expected):
                raise ValueError(
                    "the sums are not of these parameters; make them with init(params, batch), "
                    f"got {jax.tree.structure(sums)}"
                )
            known.add(met)
        return jitted(sums, params, batch, key)

    return Accumulator(every, init, checked_add, jax.jit(divide))


def _shapes(tree: PyTree) -> tuple[Any, ...]:
    """The structure of a tree and the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return (structure, *(jnp.shape(leaf) for leaf in leaves))


def _of_evaluation(evaluation: Evaluation) -> Callable[..., Any]:
    """An evaluation's sums: what it gives under an error of one for each unit of the loss."""
    for name, collector in evaluation.collectors.items():
        if getattr(collector, "batch_axis", None) is not None:
            raise ValueError(
                f"{name}: what has a batch axis does not add up over micro-batches; use "
                "bh.accumulate, or collect it from each micro-batch"
            )

    def one(params: Params, batch: Batch, key: Array | None) -> tuple[PyTree, PyTree]:
        batch = jax.tree.map(jnp.asarray, dict(batch))
        whole, _ = evaluation.objective.forward(params, batch, key=key, training=True)
        if len(jax.tree.leaves(whole.weight)) != 1:  # the rest of it is dead code
            raise ValueError("an accumulator needs a loss of one term; use bh.accumulate")
        ones = jax.tree.map(jnp.ones_like, whole.total)
        terms, collected = evaluation.evaluate(params, batch, scale=ones, key=key)
        return (terms.total, terms.weight, collected), terms.metrics

    return one


def _of_sums(
    function: Callable[..., Any], weight: Callable[[Batch], Array] | None
) -> Callable[..., Any]:
    sums = as_sums(function, weight)

    def one(params: Params, batch: Batch, key: Array | None) -> tuple[PyTree, PyTree]:
        return sums(params, batch, **({} if key is None else {"key": key})), {}

    return one
