"""Gradients from micro-batches that arrive one at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from backhand.accumulate import (
    Nonfinite,
    by_term,
    check_settings,
    of_terms,
    rescaled,
    steered_gradients,
)
from backhand.arrays import inverse
from backhand.carried import Carried, addable, begun, plus_each
from backhand.foreign import as_sums, need_one_batch
from backhand.gradients import Evaluation, Terms
from backhand.metrics import Reduction
from backhand.micro_batches import all_finite
from backhand.protocol import Static, split_key
from backhand.recent import Recent
from backhand.visit import Params, PyTree
from backhand.waiting import adding, by_identity, kept, marked, unsummed


class Sums(NamedTuple):
    """What an accumulator has seen since its last `take`; a pytree, so it checkpoints.

    Attributes:
        total: the sum of the loss, of each of its terms.
        weight: the sum of its weights, likewise.
        collected: the sums of what is collected; of a loss of several terms with the terms as
            their first axis.
        lost: what rounding added to each of these; None where that is not kept.
        metrics: the metrics so far.
        added: how many micro-batches were added, int32 ().
        dropped: how many of them were left out for a NaN or Inf, int32 ().
    """

    total: PyTree
    weight: PyTree
    collected: PyTree
    lost: tuple[Array | None, ...]
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
        drops: whether micro-batches may be left out.
    """

    every: int
    init: Callable[..., Sums]
    add: Callable[..., Sums]
    divide: Callable[[Sums], tuple[Array, PyTree]]
    drops: bool = False

    def ready(self, sums: Sums) -> bool:
        """Whether a window is full; waits for the device to have counted."""
        _check_sums(sums)
        return int(sums.added) >= self.every

    def take(self, sums: Sums, *, partial: bool = False) -> tuple[tuple[Array, PyTree], Sums]:
        """The mean loss and gradient of what was added, and empty sums for the next window.

        Waits for the device to have counted, as `ready` does.

        Args:
            sums: of a full window.
            partial: True to apply a window that is not full, at the end of an epoch for instance;
                to carry it over instead, go on adding.

        Raises:
            TypeError: for what are no sums.
            ValueError: for an empty window, or a partial one unless `partial`.
        """
        _check_sums(sums)
        count = int(sums.added)
        if count == 0:
            raise ValueError(
                "take needs at least 1 micro-batch in the window, got 0: add some first"
            )
        if count < self.every and not partial:
            raise ValueError(
                f"take needs a full window of {self.every} micro-batches, got {count}; add more, "
                "or apply what there is with partial=True"
            )
        return self.divide(sums), jax.tree.map(jnp.zeros_like, sums)

    def measured(self, sums: Sums) -> dict[str, Array]:
        """The metrics of what was added so far; "dropped", where something may be."""
        own = {name: metric.value() for name, metric in sums.metrics.items()}
        return {**own, "dropped": sums.dropped} if self.drops else own


def accumulator(
    function: Evaluation | Callable[..., Any],
    every: int,
    *,
    weight: Callable[[PyTree], Array] | None = None,
    dtype: DTypeLike = jnp.float32,
    nonfinite: Nonfinite = "keep",
) -> Accumulator:
    """`bh.accumulate` for micro-batches that arrive one at a time from the host.

    Exact for any mask and weights: a micro-batch of fewer examples, or of less weight, counts less.

    Args:
        function: as for `bh.accumulate`; an evaluation's collectors have a degree. Of a loss of
            several terms each has sums of its own, by a reverse pass of its own.
        every: how many micro-batches make a window.
        weight: as for `bh.accumulate`.
        dtype: what sums run in, at least, and what the gradient comes back in.
        nonfinite: as for `bh.accumulate`.

    Raises:
        TypeError: for something that cannot be called; when used, for what are no sums.
        ValueError: for a window of less than 1 micro-batch, or a collector that has no sum; when
            used, for sums that another model's `init` made, or that an earlier `add` used up.

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
    check_settings("accumulator", function, every, weight, dtype, nonfinite)
    evaluation, drop = function if isinstance(function, Evaluation) else None, nonfinite == "drop"
    one = _of_evaluation(evaluation, drop) if evaluation else _of_sums(function, weight)

    def first(params: Params, batch: PyTree, key: Array | None) -> tuple[PyTree, PyTree]:
        added, metrics = one(params, batch, key, None)
        alone = jax.tree.map(lambda x: jnp.asarray(x)[None], metrics)
        return added, {name: metric.wide(dtype).combine() for name, metric in alone.items()}

    def init(params: Params, batch: PyTree, *, key: Array | None = None) -> Sums:
        if evaluation:
            evaluation.objective.check(params, batch)
            batch = dict(batch)
        arrays, rest = parted(params)
        added, like = jax.eval_shape(
            lambda *given: first(whole(given[0], rest), *given[1:]), arrays, batch, key
        )
        metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        leaves, structure = jax.tree.flatten(added)
        counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return _sums([begun(leaf, dtype, every) for leaf in leaves], structure, metrics, *counts)

    def add(sums: Sums, arrays: PyTree, batch: PyTree, key: Array | None, rest: Static) -> Sums:
        structure: Any
        totals, structure = jax.tree.flatten(tuple(sums[:3]))
        carried = [Carried(*pair) for pair in zip(totals, sums.lost, strict=True)]
        *_, onto = structure.unflatten(addable(carried))
        new, metrics = one(whole(arrays, rest), batch, split_key(key, sums.added), onto)
        metrics = {name: metric.wide(dtype) for name, metric in metrics.items()}
        fine = all_finite(new) if drop else jnp.ones((), bool)
        if drop:
            new = kept(new, fine)
        counted = jnp.stack([sums.added > sums.dropped, fine])
        both = jax.tree.map(_stacked, sums.metrics, metrics)
        joined = {name: metric.combine(counted) for name, metric in both.items()}
        counts = sums.added + 1, sums.dropped + 1 - fine.astype(jnp.int32)
        return _sums(plus_each(carried, new), structure, joined, *counts)

    def divide(sums: Sums) -> tuple[Array, PyTree]:
        loss = Terms(sums.total, sums.weight, {}).mean()
        if not evaluation:
            factor = inverse(sums.weight)
            return loss, jax.tree.map(lambda g: g * factor.astype(g.dtype), sums.collected)
        ones = jax.tree.map(jnp.ones_like, sums.weight)
        several = len(jax.tree.leaves(ones)) > 1
        run = of_terms if several else rescaled
        result = run(evaluation.collectors, sums.collected, ones, sums.weight)
        return loss, result if evaluation.alone is None else result[evaluation.alone]

    jitted = jax.jit(add, donate_argnums=0, static_argnums=4)
    known: Recent[bool] = Recent()

    def checked_add(
        sums: Sums, params: Params, batch: PyTree, *more: Any, key: Array | None = None
    ) -> Sums:
        _check_sums(sums)
        need_one_batch(more)
        if evaluation:
            evaluation.objective.check(params, batch, key=key, training=True)
        met = _shapes((sums, params))
        if not known.find(met):
            expected = jax.eval_shape(lambda: init(params, batch, key=key))
            if _shapes(sums) != _shapes(expected):
                raise ValueError(
                    "the sums are not of these parameters: make new ones with "
                    "init(params, batch), once a window is taken"
                )
            known.keep(met, True)
        arrays, rest = parted(params)
        return jitted(sums, arrays, batch, key, rest)

    return Accumulator(every, init, checked_add, jax.jit(divide), drop)


def _sums(
    carried: list[Carried], structure: Any, metrics: Any, added: Array, dropped: Array
) -> Sums:
    """`Sums`, from those of the loss, its weight and what is collected."""
    total, weight, collected = structure.unflatten([each.total for each in carried])
    lost = tuple(each.lost for each in carried)
    return Sums(total, weight, collected, lost, metrics, added, dropped)


def _stacked(old: Array, new: Array) -> Array:
    """A metric so far, and that of one more micro-batch: of integers in what a sum of them has."""
    return jnp.stack([old, new if new.dtype == old.dtype else new.astype(old.dtype)])


def parted(params: Params) -> tuple[PyTree, Static]:
    """The arrays among the leaves, and what is left: the functions of an Equinox module."""
    leaves, structure = jax.tree.flatten(params)
    fixed = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
    return [leaf for leaf in leaves if _is_array(leaf)], Static((structure, fixed))


def whole(arrays: PyTree, rest: Static) -> Params:
    """Undoes `parted`."""
    structure, fixed = rest.value
    left = iter(arrays)
    return structure.unflatten([next(left) if leaf is None else leaf for leaf in fixed])


def _is_array(leaf: Any) -> bool:
    """Whether JAX takes a leaf as an array."""
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)


def _check_sums(sums: Any) -> None:
    """Refuses what an accumulator's `init` did not make, or `add` used up.

    Raises:
        TypeError: saying how to make it.
        ValueError: saying what to go on with.
    """
    if not isinstance(sums, Sums):
        raise TypeError(
            "an accumulator goes on from sums, made by its init(params, batch) and given back by "
            f"add and take; got {type(sums).__name__}"
        )
    traced = isinstance(sums.added, jax.core.Tracer)
    if not traced and getattr(sums.added, "is_deleted", bool)():
        raise ValueError(
            "these sums were used up by an earlier add: go on with those that came back, as in "
            "sums = window.add(sums, params, batch)"
        )


def _shapes(tree: PyTree) -> tuple[Any, ...]:
    """The structure of a tree and the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return (structure, *(np.shape(leaf) if _is_array(leaf) else leaf for leaf in leaves))


def _of_evaluation(evaluation: Evaluation, drop: bool) -> Callable[..., Any]:
    """An evaluation's sums: what it gives under an error of one for each unit of the loss."""
    for name, collector in evaluation.collectors.items():
        if getattr(collector, "batch_axis", None) is not None:
            raise ValueError(
                f"{name}: what has a batch axis does not add up over micro-batches; use "
                "bh.accumulate, or collect it from each micro-batch"
            )

    def one(
        params: Params, batch: PyTree, key: Array | None, sums: PyTree
    ) -> tuple[PyTree, PyTree]:
        batch = jax.tree.map(jnp.asarray, dict(batch))
        seen, _ = evaluation.objective.forward(params, batch, key=key, training=True)
        ones = jax.tree.map(jnp.ones_like, seen.total)  # the rest of it is dead code
        steered = steered_gradients(evaluation)
        run = evaluation.evaluate
        if len(jax.tree.leaves(ones)) > 1:
            run, steered = by_term(evaluation), None
        elif steered is not None and sums is not None:
            onto = by_identity(params, sums[steered.name])
            run = steered.collecting(unsummed(waiting=False) if drop else adding(onto))
        terms, collected = run(params, batch, scale=ones, key=key)
        if steered is not None:
            collected[steered.name] = marked(params, collected[steered.name])
        return (terms.total, terms.weight, collected), terms.metrics

    return one


def _of_sums(
    function: Callable[..., Any], weight: Callable[[PyTree], Array] | None
) -> Callable[..., Any]:
    """The sums of another library's function."""
    sums = as_sums(function, weight)

    def one(params: Params, batch: PyTree, key: Array | None, _: PyTree) -> tuple[PyTree, PyTree]:
        return sums(params, batch, **({} if key is None else {"key": key})), {}

    return one
