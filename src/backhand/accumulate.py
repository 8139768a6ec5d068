"""The gradient of a large batch from small ones, exactly.

A mean of micro-batch means is wrong as soon as the micro-batches weigh differently: masked, ragged.
Sums and weights add up instead, in float32, and are divided once. Where the weight of the whole
batch is known beforehand the division comes first, and each micro-batch goes back with the error
that it has in the whole batch: then whatever is collected, not only gradients, simply adds up.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from backhand.arrays import accumulation_dtype, inverse, is_floating
from backhand.gradients import Batch, Evaluation, Objective, Terms
from backhand.metrics import Sum
from backhand.protocol import split_key
from backhand.visit import Params, PyTree

Nonfinite: TypeAlias = Literal["keep", "drop"]


def accumulate(
    function: Evaluation | Callable[..., Any],
    micro_batches: int,
    *,
    weight: Callable[[Batch], Array] | None = None,
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
            `(params, batch, ...) -> ((sum, weight), gradient of the sum)`, of any library.
        micro_batches: K. An evaluation's batch that K does not divide is filled up with examples of
            weight 0, which still take part in a batch norm's statistics; another function's must
            divide.
        weight: for a function that gives `(mean, gradient of the mean)`: from a micro-batch, the
            weight of its mean. A mean alone cannot be accumulated exactly.
        dtype: what sums run in, at least; float64 sums stay float64.
        nonfinite: "drop" leaves out a micro-batch whose loss or gradient has a NaN or Inf, with its
            weight and metrics; their number is the metric "dropped" (for another function, it is
            only left out). "keep" lets it through.

    Returns:
        An evaluation for an evaluation; else a function `(params, batch, *, key=None, ...) ->
        (mean, gradient)`, to be jitted with what surrounds it. A `key` is split.

    Raises:
        TypeError: for something that cannot be called.
        ValueError: if K < 1; when called, for a batch that does not divide, or for "drop" with a
            loss of several terms.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> value, grads = bh.accumulate(bh.value_and_grad(loss), 2)(params, batch)
    """
    check_settings("accumulate", function, micro_batches, weight, nonfinite)
    if not isinstance(function, Evaluation):
        return _of_sums(function, micro_batches, weight, dtype, nonfinite)
    if micro_batches == 1 and nonfinite == "keep":
        return function
    return _of_evaluation(function, micro_batches, dtype, nonfinite)


def check_settings(
    name: str,
    function: Any,
    micro_batches: int,
    weight: Callable[[Batch], Array] | None,
    nonfinite: str,
) -> None:
    """Refuses what cannot be accumulated.

    Raises:
        TypeError: for something that cannot be called, or a weight beside an evaluation.
        ValueError: for less than 1 micro-batch, or an unknown choice.
    """
    if not callable(function) or isinstance(function, Objective):
        raise TypeError(
            f"{name} needs a function that gives gradients, such as bh.value_and_grad(objective); "
            f"got {function!r}"
        )
    if operator.index(micro_batches) < 1:
        raise ValueError(f"{name} needs at least 1 micro-batch, got {micro_batches}")
    if nonfinite not in ("keep", "drop"):
        raise ValueError(f"nonfinite must be 'keep' or 'drop', got {nonfinite!r}")
    if weight is not None and isinstance(function, Evaluation):
        raise TypeError("weight is for other functions: an evaluation knows the weight of its mean")


def _of_evaluation(
    evaluation: Evaluation, micro_batches: int, dtype: DTypeLike, nonfinite: Nonfinite
) -> Evaluation:
    """`accumulate` of an evaluation, each micro-batch scaled by the weight of the whole batch."""
    axes = {name: getattr(c, "batch_axis", None) for name, c in evaluation.collectors.items()}

    def evaluate(
        params: Params,
        batch: Batch,
        *,
        scale: PyTree = None,
        key: Array | None = None,
        training: bool = True,
    ) -> tuple[Terms, dict[str, PyTree]]:
        length = jax.tree.leaves(batch)[0].shape[0]
        batch = _filled(dict(batch), -length % micro_batches)
        divides = scale is None
        if divides:  # the weight is a function of the batch: the rest is dead code
            whole, _ = evaluation.objective.forward(params, batch, key=key, training=training)
            scale = jax.tree.map(inverse, whole.weight)

        def one(part: Batch, index: Array | int) -> tuple[PyTree, PyTree]:
            terms, collected = evaluation.evaluate(
                params, part, scale=scale, key=split_key(key, index), training=training
            )
            added = {name: tree for name, tree in collected.items() if axes[name] is None}
            own = {name: tree for name, tree in collected.items() if axes[name] is not None}
            return (terms.total, terms.weight, added), (terms.metrics, own)

        (total, weight, added), (metrics, own), fine = _scan(
            one, batch, micro_batches, dtype, nonfinite
        )
        joined = {
            name: jax.tree.map(lambda leaf, axis=axes[name]: _join(leaf, axis, length), tree)
            for name, tree in own.items()
        }
        collected = {name: (added | joined)[name] for name in evaluation.collectors}
        kept = fine if nonfinite == "drop" else None
        metrics = {name: metric.combine(kept) for name, metric in metrics.items()}
        if nonfinite == "drop":
            metrics["dropped"] = Sum(jnp.sum(~fine, dtype=jnp.int32))
            if divides:
                collected = rescaled(evaluation.collectors, collected, scale, weight)
        return Terms(total, weight, metrics), collected

    return dataclasses.replace(evaluation, evaluate=jax.jit(evaluate, static_argnames="training"))


def rescaled(
    collectors: Mapping[str, Any], collected: dict[str, PyTree], scale: PyTree, weight: PyTree
) -> dict[str, PyTree]:
    """What was collected under the error `scale`, as under one over `weight`.

    Raises:
        ValueError: for a loss of several terms, whose gradients cannot be told apart any more, or
            for a collector that does not say how it follows the error (`Collector.degree`).
    """
    if len(jax.tree.leaves(scale)) != 1:
        raise ValueError("a loss of several terms needs its weights before the reverse pass")
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


def _of_sums(
    function: Callable[..., Any],
    micro_batches: int,
    weight: Callable[[Batch], Array] | None,
    dtype: DTypeLike,
    nonfinite: Nonfinite,
) -> Callable[..., Any]:
    """`accumulate` of a function that gives sums, or means whose weights are stated."""
    sums = as_sums(function, weight)

    def run(params: Params, batch: Batch, *, key: Array | None = None, **given: Any) -> Any:
        def one(part: Batch, index: Array | int) -> tuple[PyTree, PyTree]:
            own = {} if key is None else {"key": split_key(key, index)}
            return sums(params, part, **own, **given), ()

        (total, w, grads), _, _ = _scan(one, batch, micro_batches, dtype, nonfinite)
        return total * inverse(w), jax.tree.map(lambda g: g * inverse(w).astype(g.dtype), grads)

    return run


def as_sums(
    function: Callable[..., Any], weight: Callable[[Batch], Array] | None
) -> Callable[..., tuple[Array, Array, PyTree]]:
    """`(params, batch, ...) -> (sum, weight, gradient of the sum)`, of either form of function."""

    def sums(params: Params, batch: Batch, **given: Any) -> tuple[Array, Array, PyTree]:
        value, grads = function(params, batch, **given)
        if weight is None:
            return (*_pair(value), grads)
        w = jnp.asarray(weight(batch), value.dtype)
        return w * value, w, jax.tree.map(lambda g: w.astype(g.dtype) * g, grads)

    return sums


def _pair(value: Any) -> tuple[Array, Array]:
    """What a function that gives sums gave as its value.

    Raises:
        TypeError: if it is not a (sum, weight) pair.
    """
    if isinstance(value, tuple) and len(value) == 2:
        return value[0], jnp.asarray(value[1])
    raise TypeError(
        "accumulate needs a function that gives ((sum, weight), gradient of the sum), as "
        "jax.value_and_grad(f, has_aux=True) of an f that gives (sum, weight) does; one that gives "
        "a mean needs weight=, a function of a micro-batch"
    )


def _scan(
    one: Callable[[Batch, Any], tuple[PyTree, PyTree]],
    batch: Batch,
    micro_batches: int,
    dtype: DTypeLike,
    nonfinite: Nonfinite,
) -> tuple[Any, Any, Array]:
    """Runs `one(part, index) -> (added, own)` over the micro-batches.

    Returns:
        What was added, summed; what is each part's own, stacked; which parts (K,) were not dropped.
    """
    columns = _in_columns(batch, micro_batches)

    def part(index: Array) -> Batch:
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 1, False), columns)

    # Sums are carried from the last leaf to the first, about as the reverse pass comes to them: XLA
    # then adds each as soon as it is there (temporary memory of 784-1024-1024-10 with AdamW at
    # micro-batches of 256: 0.40 gradients above one plain step's, 0.54 in the order of the tree).
    def step(sums: list[Array], index: Array) -> tuple[list[Array], PyTree]:
        new, own = one(part(index), index)
        fine = jnp.ones((), bool) if nonfinite == "keep" else all_finite(new)
        if nonfinite == "drop":
            new, own = jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros_like(x)), (new, own))
        pairs = zip(sums, reversed(jax.tree.leaves(new)), strict=True)
        return [total + x.astype(total.dtype) for total, x in pairs], (own, fine)

    indices = jnp.arange(micro_batches, dtype=jnp.int32)
    like, _ = jax.eval_shape(lambda index: one(part(index), index), indices[0])
    leaves, structure = jax.tree.flatten(like)
    sums, (own, fine) = lax.scan(step, [zeros(x, dtype) for x in reversed(leaves)], indices)
    added = [total.astype(x.dtype) for total, x in zip(reversed(sums), leaves, strict=True)]
    return jax.tree.unflatten(structure, added), own, fine


def all_finite(tree: PyTree) -> Array:
    """Whether no number in the tree is NaN or infinite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if is_floating(x)]
    return jnp.all(jnp.stack(finite))


def _filled(batch: dict[str, PyTree], missing: int) -> dict[str, PyTree]:
    """The batch with `missing` more examples of weight 0, copies of the last one."""
    if missing == 0:
        return batch
    length = jax.tree.leaves(batch)[0].shape[0]
    weights = batch.get("weights", jnp.ones(length))

    def last(leaf: Array) -> Array:
        return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, 0)])

    def weightless(w: Array) -> Array:
        return jnp.concatenate([w, jnp.zeros((missing, *w.shape[1:]), w.dtype)])

    filled = {name: jax.tree.map(last, value) for name, value in batch.items()}
    return filled | {"weights": jax.tree.map(weightless, weights)}


def _in_columns(batch: Batch, micro_batches: int) -> Batch:
    """Every (B, ...) as (B / K, K, ...), a view: column k is micro-batch k.

    Raises:
        ValueError: if there is no common B, or K does not divide it.
    """
    lengths = sorted({np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)})
    if len(lengths) != 1 or lengths[0] == ():
        raise ValueError(
            "accumulate needs a batch whose arrays have one common first axis, got lengths "
            f"{[length[0] if length else 'none' for length in lengths]}"
        )
    ((length,),) = lengths
    if length % micro_batches:
        raise ValueError(
            f"accumulate needs a batch that divides into {micro_batches} micro-batches, got "
            f"{length} examples; fill it up with examples of weight 0"
        )

    def split(leaf: Any) -> Array:
        return jnp.reshape(leaf, (length // micro_batches, micro_batches, *np.shape(leaf)[1:]))

    return jax.tree.map(split, batch)


def _join(leaf: Array, axis: int, length: int) -> Array:
    """Undoes `_in_columns` along the batch axis of (K, ..., B / K, ...), counted from the end."""
    leaf = jnp.moveaxis(leaf, 0, leaf.ndim + axis)
    place = leaf.ndim + axis - 1
    leaf = leaf.reshape(*leaf.shape[:place], -1, *leaf.shape[place + 2 :])
    return lax.slice_in_dim(leaf, 0, length, axis=place)


def zeros(like: jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array:
    """Where a sum begins: in `dtype`, or float64 where its terms are."""
    wide = accumulation_dtype(like.dtype)
    return jnp.zeros(like.shape, wide if wide == jnp.float64 else dtype, device=like.sharding)
