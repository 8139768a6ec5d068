"""The gradient of a large batch from small ones, exactly.

A mean of micro-batch means is wrong as soon as the micro-batches weigh differently: masked, ragged.
Here every micro-batch goes back with the error that it has in the whole batch, 1 / (weight of
everything), so what it gives simply adds up.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import accumulation_dtype
from backhand.gradients import Batch, Evaluation, Terms, inverse
from backhand.protocol import split_key
from backhand.visit import Params, PyTree


def accumulate(evaluation: Evaluation, micro_batches: int) -> Evaluation:
    """The same loss and gradient, computed in micro-batches: one jitted scan, float32 sums.

    Equal to the whole batch's for any mask and weights, up to rounding. What couples the examples
    of a batch does so within each micro-batch: a batch norm's statistics, and the key, of which
    each gets its own. Micro-batch k holds examples k, k + K, k + 2K, ..., so that a batch sharded
    over devices stays where it is.

    Args:
        evaluation: what `bh.value_and_grad` or `bh.value_and_collect` gives.
        micro_batches: K; it must divide the length of the batch.

    Returns:
        A function of the same signature, itself an evaluation.

    Raises:
        TypeError: for another function; `jax.value_and_grad` gives a mean without its weight.
        ValueError: if K < 1 or, when called, K does not divide the batch.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> value, grads = bh.accumulate(bh.value_and_grad(loss), 2)(params, batch)
    """
    if not isinstance(evaluation, Evaluation):
        raise TypeError(
            "accumulate needs what bh.value_and_grad(objective) or bh.value_and_collect gives, "
            f"which knows the weight of its mean, got {evaluation!r}; for automatic gradients use "
            'bh.value_and_grad(objective, gradients="automatic")'
        )
    if micro_batches < 1:
        raise ValueError(f"accumulate needs at least 1 micro-batch, got {micro_batches!r}")
    if micro_batches == 1:
        return evaluation
    axes = {name: getattr(c, "batch_axis", None) for name, c in evaluation.collectors.items()}

    def evaluate(
        params: Params,
        batch: Batch,
        *,
        scale: PyTree = None,
        key: Array | None = None,
        training: bool = True,
    ) -> tuple[Terms, dict[str, PyTree]]:
        if scale is None:  # the weight is a function of the batch: the rest is dead code
            whole, _ = evaluation.objective.forward(params, batch, key=key, training=training)
            scale = jax.tree.map(inverse, whole.weight)

        def one(index: Array | int, part: Batch) -> tuple[PyTree, PyTree]:
            """What a micro-batch adds to the sums, and what it gives for its own examples."""
            terms, collected = evaluation.evaluate(
                params, part, scale=scale, key=split_key(key, index), training=training
            )
            added = {name: tree for name, tree in collected.items() if axes[name] is None}
            own = {name: tree for name, tree in collected.items() if axes[name] is not None}
            return (terms, added), own

        def step(sums: PyTree, micro: tuple[Array, Batch]) -> tuple[PyTree, PyTree]:
            new, own = one(*micro)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, new), own

        parts = jax.tree.map(lambda leaf: _split(leaf, micro_batches), dict(batch))
        like, _ = jax.eval_shape(one, 0, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(_zeros, like)
        sums, own = lax.scan(step, zeros, (jnp.arange(micro_batches), parts))
        terms, added = jax.tree.map(lambda total, x: total.astype(x.dtype), sums, like)
        joined = {
            name: jax.tree.map(lambda leaf, axis=axes[name]: _join(leaf, axis), tree)
            for name, tree in own.items()
        }
        return terms, {name: (added | joined)[name] for name in evaluation.collectors}

    return dataclasses.replace(evaluation, evaluate=jax.jit(evaluate, static_argnames="training"))


def _split(leaf: Array, micro_batches: int) -> Array:
    """(B, ...) as (K, B / K, ...), example b in micro-batch b mod K.

    Raises:
        ValueError: if K does not divide B.
    """
    length = leaf.shape[0]
    if length % micro_batches:
        raise ValueError(
            f"accumulate needs a batch that divides into {micro_batches} micro-batches, got "
            f"{length} examples; fill it up with examples of weight 0"
        )
    return leaf.reshape(length // micro_batches, micro_batches, *leaf.shape[1:]).swapaxes(0, 1)


def _join(leaf: Array, axis: int) -> Array:
    """Undoes `_split` along the batch axis of (K, ..., B / K, ...), counted from the end."""
    leaf = jnp.moveaxis(leaf, 0, leaf.ndim + axis)
    place = leaf.ndim + axis - 1
    return leaf.reshape(*leaf.shape[:place], -1, *leaf.shape[place + 2 :])


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Where a sum begins: in at least float32."""
    return jnp.zeros(like.shape, accumulation_dtype(like.dtype), device=like.sharding)
