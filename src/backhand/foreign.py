"""Accumulated gradients of functions of any library: of sums, or of means and their weights."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from backhand.arrays import accumulation_dtype, inverse, is_floating
from backhand.gradients import Terms
from backhand.metrics import Reduction, Sum
from backhand.micro_batches import Micro, columns, like_given, over
from backhand.protocol import listed, split_key
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

    def __call__(
        self, params: Params, batch: PyTree, *more: Any, **given: Any
    ) -> tuple[Array, PyTree]:
        """The mean and its gradient, each sum divided once."""
        need_one_batch(more)
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
    in, and a scan is one of its own. An array of NumPy's may not be changed at all.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_numpy(leaf) else leaf, params)


def _is_numpy(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray)


def need_one_batch(more: tuple[Any, ...]) -> None:
    """Refuses a batch in several arguments.

    Raises:
        TypeError: saying how to give it.
    """
    if more:
        raise TypeError(
            f"a batch is one dict or tuple of arrays, got {1 + len(more)} arguments for it: give "
            "(params, (x, y)), to a function of (params, batch); a key goes by key=..."
        )


def as_sums(
    function: Callable[..., Any], weight: Callable[[PyTree], Array] | None
) -> Callable[..., tuple[Array, Array, PyTree]]:
    """`(params, batch, ...) -> (sum, weight, gradient of the sum)`, of either form of function.

    A mean times its weight is in at least float32: in float16 it might overflow.

    Raises:
        TypeError: when called, for a function that gives no pair, or changes what it is given.
        ValueError: when called, for a gradient of another shape than its parameter.
    """

    def sums(params: Params, batch: PyTree, **given: Any) -> tuple[Array, Array, PyTree]:
        named, structure = _named(params), jax.tree.structure(params)
        _need_key(function, given)
        result = function(params, batch, **given)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "accumulate needs a function that gives a value and its gradient, as "
                "jax.value_and_grad(f) does, not a gradient alone"
            )
        _check_unchanged(lambda own: function(own, batch, **given), named, structure, params)
        value, grads = result
        _check_gradient(named, grads)
        if weight is None:
            total, w = _pair(value)
            return _scalar("sum", total), _scalar("weight", w), grads
        if isinstance(value, tuple):
            raise TypeError(
                "beside weight= accumulate needs a function that gives (mean, gradient), the value "
                f"a mean and not a tuple of {len(value)}; one that gives a sum and its weight "
                "needs no weight="
            )
        value = _scalar("mean", value)
        w = _scalar("weight", weight(batch)).astype(accumulation_dtype(value.dtype))

        def of_sum(x: Array) -> Array:
            """A mean of nothing, 0 / 0, is no part of the sum."""
            wide = accumulation_dtype(x.dtype)
            return jnp.where(w == 0, 0, w.astype(wide) * x.astype(wide))

        return of_sum(value), w, jax.tree.map(of_sum, grads)

    return sums


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths: "hidden/w"."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _need_key(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuses to call without a key what cannot be.

    Raises:
        TypeError: saying how to give one.
    """
    try:
        others = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):  # some callables do not say
        return
    if "key" not in given and any(p.name == "key" and p.default is p.empty for p in others):
        raise TypeError(
            "the function needs a key: give key=jax.random.key(seed), of which each micro-batch "
            "gets its own"
        )


def _check_gradient(params: Mapping[str, Any], grads: PyTree) -> None:
    """Refuses what is no gradient: of what is at the path of a parameter, another shape.

    Raises:
        TypeError: naming the first leaf that is no floating-point array.
        ValueError: naming the first of another shape.
    """
    for name, leaf in _named(grads).items():
        if not hasattr(leaf, "dtype") or not (is_floating(leaf) or jnp.iscomplexobj(leaf)):
            raise TypeError(
                f"accumulate needs a gradient of floating-point arrays, got {leaf!r} for "
                f"{name or 'all'}"
            )
        if name in params and np.shape(leaf) != np.shape(params[name]):
            raise ValueError(
                f"accumulate needs gradients of the shapes of the parameters, {name or 'here'}: "
                f"{np.shape(params[name])}, got {np.shape(leaf)}"
            )


def _check_unchanged(
    function: Callable[..., Any],
    before: Mapping[str, Any],
    structure: Any,
    params: Params,
) -> None:
    """Refuses a function that has changed its parameters, as a Flax NNX model may.

    Args:
        function: of the parameters.
        before: their leaves by name, before it was called.
        structure: theirs.
        params: the parameters now.

    Raises:
        TypeError: naming what was changed, and how to do without.
    """
    after, twice = _named(params), _named(params)
    gone = [name for name in before if name not in after]
    made_anew = {name for name in after if after[name] is not twice[name]}  # by flattening alone
    replaced = [name for name in after if after[name] is not before.get(name)]
    replaced = [name for name in replaced if name not in made_anew]
    if not replaced and not gone:
        return

    def left(leaves: list[Any]) -> dict[str, Any]:
        again = structure.unflatten(leaves)
        function(again)
        return _named(again)

    # An inner `nnx.jit` or `nnx.remat` replaces every leaf: the program knows which came in.
    program = jax.make_jaxpr(left)(list(before.values())).jaxpr
    origins = dict(zip(sorted(after), (_origin(program, v) for v in program.outvars), strict=True))
    came_in = dict(zip(before, program.invars, strict=True))
    changed = gone + [name for name in replaced if origins[name] is not came_in.get(name)]
    if changed:
        raise TypeError(
            "accumulate needs a function that changes nothing that it is given, for the change is "
            f"lost: this one changes {listed(changed)} of its model. Call model.eval() before, or "
            "split the model (nnx.split), merge it inside the function, and make its noise from a "
            "key, given by key=..., of which each micro-batch gets its own"
        )


def _origin(program: Any, variable: Any) -> Any:
    """The variable that one is handed on from, through functions inside, jitted or checkpointed."""
    for equation in program.eqns:
        place = next((i for i, v in enumerate(equation.outvars) if v is variable), None)
        if place is not None and equation.primitive.name in ("jit", "remat2", "checkpoint"):
            inner = equation.params["jaxpr"]
            inner = getattr(inner, "jaxpr", inner)
            source = _origin(inner, inner.outvars[place])
            for own, outer in zip(inner.invars, equation.invars, strict=True):
                if own is source:
                    return _origin(program, outer)
    return variable


def _pair(value: Any) -> tuple[Any, Any]:
    """What a function that gives sums gave as its value.

    Raises:
        TypeError: if it is not a (sum, weight) pair.
    """
    if isinstance(value, tuple) and len(value) == 2:
        return value
    raise TypeError(
        "accumulate needs a function that gives ((sum, weight), gradient of the sum), as "
        "jax.value_and_grad(f, has_aux=True) of an f that gives (sum, weight) does; one that gives "
        "a mean needs weight=, a function of a micro-batch"
    )


def _scalar(name: str, x: Any) -> Array:
    """What a whole micro-batch has one of.

    Raises:
        TypeError: for what is no number.
        ValueError: for what each example has.
    """
    if not isinstance(x, Array | np.ndarray | np.generic | int | float):
        raise TypeError(f"the {name} of a micro-batch is one number, got a {type(x).__name__}")
    if np.shape(x) != ():
        raise ValueError(
            f"the {name} of a micro-batch is one number, got shape {np.shape(x)}: sum over its "
            "examples"
        )
    return jnp.asarray(x)
