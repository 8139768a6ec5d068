"""Any two ways to the same gradient, leaf by leaf."""

from collections.abc import Mapping
from typing import Any

from jax import Array

from backhand.audit.functions import Returns, compare_functions
from backhand.audit.inputs import readable
from backhand.audit.objectives import compare_objective
from backhand.audit.report import Report
from backhand.gradients import Objective
from backhand.visit import PyTree


def compare(
    f: Any,
    *args: PyTree,
    key: Array | None = None,
    training: bool = True,
    rtol: float | None = None,
    returns: Returns | tuple[Returns, Returns] = "value",
) -> Report:
    """Compares two ways to the same gradient, leaf by leaf.

    Either `compare(objective, params, batch)`: an objective's hand-written gradient beside
    `jax.grad`'s. A leaf agrees where each element is within a few roundings of what is summed in
    it, in the coarsest dtype that either side computes in, and their common factor within a quarter
    of that. Where leaves differ, both gradients are computed again in float64: a leaf whose true
    gradient is zero, such as a bias before a normalization, is all rounding in float32. It agrees
    if the two do in float64, and the hand-written one in float32 is as near to that as
    `jax.grad`'s.

    Or `compare(f, g, *args)`: two functions of the same arguments, each differentiated by JAX, by
    its `jax.custom_vjp` rule where it has one; an op, a layer or an objective by the hand-written
    one. Arguments are pytrees, Flax NNX and Equinox modules too; leaves that are no floating-point
    arrays are held fixed. An output that is no single number is pulled back from random errors. g
    counts as the truth: f may be as inaccurate as g is against float64.

    Args:
        f: an objective, or the first function.
        args: `params, batch`; or the second function and the arguments of both.
        key: for an objective whose model uses one while training.
        training: False to evaluate an objective.
        rtol: another tolerance, of the largest difference over the largest magnitude in a leaf.
        returns: what the functions return: "value"; "gradient", as `jax.grad(loss)` does, of the
            first argument; or "value and gradient". A pair, where the two differ. A gradient may
            be written in NumPy; what `has_aux=True` adds is left out.

    Returns:
        A report: print it for a table, or call its `assert_close()` or `to_dict()`.

    Raises:
        TypeError: for other than two functions or an objective, for functions that do not run or
            are not differentiable.
        ValueError: for a batch that the objective refuses, for outputs or gradients of different
            trees.

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> bh.compare(loss, params, batch).agrees
        True
        >>> x = jnp.linspace(-2.0, 2.0, 5)
        >>> bh.compare(jnp.tanh, lambda x: jnp.sinh(x) / jnp.cosh(x), x).agrees
        True
        >>> bh.compare(bh.grad(loss), jax.grad(loss), params, batch, returns="gradient").agrees
        True
    """
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol must be 0 or more, got {rtol}")
    second = args[0] if args else None
    two = callable(f) and callable(second) and not isinstance(second, Mapping)
    if isinstance(f, Objective) and not two:
        if len(args) != 2:
            raise TypeError(
                f"compare(objective, params, batch) takes params and a batch, got {len(args)} "
                "arguments after the objective"
            )
        return compare_objective(f, *args, {"key": key, "training": training}, rtol)
    if not two:
        name = getattr(f, "__name__", None)
        if name is not None and second is not None:
            raise TypeError(
                f"compare(f, g, *args) needs a second function before the arguments of {name}, "
                f"got {readable(second)}; a function alone is checked by bh.check(f, *args)"
            )
        raise TypeError(
            "compare needs two functions, compare(f, g, *args), or an objective, made by "
            f"bh.objective(model, loss); got {readable(f)} and {readable(second)}"
        )
    return compare_functions(f, second, args[1:], {"key": key, "training": training}, rtol, returns)
