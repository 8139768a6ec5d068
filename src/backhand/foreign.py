"""Accumulated gradients of functions of any library: of sums, or of means and their weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from backhand.arrays import accumulation_dtype, inverse
from backhand.gradients import Terms
from backhand.metrics import Reduction, Sum
from backhand.micro_batches import Micro, columns, like_given, over
from backhand.protocol import split_key
from backhand.visit import Params, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulated:
    """Another library's function in micro-batches; made by `accumulate`.

    `(params, batch, *, key=None, ...) -> (mean, gradient)`; a `key` is split.

    Args:
        evaluate: of the same arguments, with `Terms` in the place of the mean: the sum, its weight
            and, where something may be dropped, the metric "dropped".
    """

    evaluate: Callable[..., tuple[Terms, PyTree]]

    def __call__(self, params: Params, batch: PyTree, **given: Any) -> tuple[Array, PyTree]:
        """The mean and its gradient, each sum divided once."""
        terms, grads = self.evaluate(params, batch, **given)
        return terms.mean(), grads


def of_sums(
    function: Callable[..., Any],
    micro_batches: int,
    weight: Callable[[PyTree], Array] | None,
    dtype: DTypeLike,
    drop: bool,
) -> Accumulated:
    """`accumulate` of a function that gives sums, or means whose weights are stated."""
    sums = as_sums(function, weight)

    def evaluate(
        params: Params, batch: PyTree, *, key: Array | None = None, **given: Any
    ) -> tuple[Terms, PyTree]:
        def call(function: Callable[..., Any], part: PyTree, index: Any) -> Any:
            own = {} if key is None else {"key": split_key(key, index)}
            return function(rebuilt(params), part, **own, **given)

        def one(part: PyTree, index: Any, _: PyTree) -> Micro:
            return Micro(call(sums, part, index), (), ())

        whole = over(one, batch, micro_batches, dtype=dtype, drop=drop)
        loss, total, grads = whole.sums
        grads = jax.tree.map(lambda g: g * inverse(total).astype(g.dtype), grads)
        dropped: dict[str, Reduction] = {}
        if drop:
            dropped["dropped"] = Sum(jnp.sum(~whole.fine, dtype=jnp.int32))
        terms = Terms(loss, total.astype(loss.dtype), dropped)
        if weight is None:
            return terms, like_given(grads, whole.like[2])
        part = columns(batch, micro_batches).sizes()[0]
        return terms, like_given(grads, jax.eval_shape(lambda: call(function, part, 0)[1]))

    return Accumulated(evaluate)


def rebuilt(params: Params) -> Params:
    """The same leaves in a new tree.

    What holds state, such as a Flax NNX model, may only be changed in the trace that it was made
    in, and a scan is one of its own.
    """
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, leaves)


def as_sums(
    function: Callable[..., Any], weight: Callable[[PyTree], Array] | None
) -> Callable[..., tuple[Array, Array, PyTree]]:
    """`(params, batch, ...) -> (sum, weight, gradient of the sum)`, of either form of function.

    A mean times its weight is in at least float32: in float16 it might overflow.

    Raises:
        TypeError: when called, for a function that gives no pair.
    """

    def sums(params: Params, batch: PyTree, **given: Any) -> tuple[Array, Array, PyTree]:
        result = function(params, batch, **given)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "accumulate needs a function that gives a value and its gradient, as "
                "jax.value_and_grad(f) does, not a gradient alone"
            )
        value, grads = result
        if weight is None:
            total, w = _pair(value)
            return _scalar("sum", total), _scalar("weight", w), grads
        value = _scalar("mean", value)
        w = _scalar("weight", jnp.asarray(weight(batch), accumulation_dtype(value.dtype)))

        def of_sum(x: Array) -> Array:
            """A mean of nothing, 0 / 0, is no part of the sum."""
            wide = accumulation_dtype(x.dtype)
            return jnp.where(w == 0, 0, w.astype(wide) * x.astype(wide))

        return of_sum(value), w, jax.tree.map(of_sum, grads)

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


def _scalar(name: str, x: Array) -> Array:
    """What a whole micro-batch has one of.

    Raises:
        ValueError: for what each example has.
    """
    if jnp.shape(x) != ():
        raise ValueError(
            f"the {name} of a micro-batch is one number, got shape {jnp.shape(x)}: sum over its "
            "examples"
        )
    return x
