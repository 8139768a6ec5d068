"""Hand-written against automatic gradients of one objective, leaf by leaf."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backhand.audit.report import Report, Row
from backhand.gradients import Batch, Objective, value_and_grad
from backhand.protocol import Layer
from backhand.visit import Params, PyTree


def compare(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    key: Array | None = None,
    training: bool = True,
    rtol: float | None = None,
) -> Report:
    """Compares the hand-written gradient of an objective with `jax.grad`'s, leaf by leaf.

    A leaf agrees where the largest difference, over the largest magnitude in the leaf, is within
    the tolerance: 2 eps^(2/3) for the coarsest dtype that the objective computes in (5e-5 for
    float32, 8e-2 for bfloat16), and the norms of the two are within a quarter of it. Where float32
    leaves differ, both gradients are computed again in float64: a leaf whose true gradient is zero,
    such as a bias before a normalization, is all rounding in float32. It agrees if the two do in
    float64, and the hand-written one in float32 is as near to that as `jax.grad`'s.

    Args:
        objective: what to differentiate.
        params: its parameters.
        batch: a batch.
        key: for a model that uses one while training.
        training: False for evaluation.
        rtol: another tolerance.

    Returns:
        A report: print it for a table, or call its `assert_close()` or `to_dict()`.

    Raises:
        TypeError: for something other than an objective.
        ValueError: for a batch that the objective refuses.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> bh.compare(loss, params, batch).agrees
        True
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "compare needs an objective, made by bh.objective(model, loss); "
            f"got {type(objective).__name__}"
        )
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol must be 0 or more, got {rtol}")
    objective.check(params, batch, key=key, training=training)
    params, batch = jax.tree.map(jnp.asarray, (params, dict(batch)))
    order = [path for path, _ in in_model_order(objective.model, params)]

    def run(params: Params, batch: Batch) -> tuple[list[float], list[dict[str, np.ndarray]]]:
        sides = [jax.jit(side, static_argnames="training") for side in _sides(objective)]
        results = [side(params, batch, key=key, training=training) for side in sides]
        leaves = [
            {path: np.asarray(leaf) for path, leaf in in_model_order(None, grads)}
            for _, grads in results
        ]
        return [float(value) for value, _ in results], leaves

    def loss(params: Params) -> Array:
        return objective(params, batch, key=key, training=training)

    dtypes = _dtypes(jax.make_jaxpr(loss)(params))
    tolerance = _tolerance(dtypes) if rtol is None else rtol
    values, (manual, automatic) = run(params, batch)
    rows = [_row(path, manual[path], automatic[path], tolerance) for path in order]
    if not all(row.agrees for row in rows) and dtypes == {jnp.dtype(jnp.float32)}:
        with jax.enable_x64(True):
            _, (wide, truth) = run(_wide(params), _wide(batch))
        largest = max(float(np.abs(leaf).max(initial=0)) for leaf in truth.values())
        for place, row in enumerate(rows):
            exact = _row(row.path, wide[row.path], truth[row.path], 1e-9, floor=1e-13 * largest)
            ours, theirs = (
                np.abs(side[row.path] - truth[row.path]).max(initial=0)
                for side in (manual, automatic)
            )
            if exact.agrees and ours <= 2 * theirs + 8 * np.finfo(np.float32).eps * largest:
                rows[place] = _settled(row, exact)
    return Report(tuple(rows), ("manual", "automatic"), (values[0], values[1]), tolerance)


def in_model_order(model: Layer | None, tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The leaves of parameters and their paths, in the order of the model's layers.

    A dict comes back from jit in alphabetical order; the layer knows its parts.
    """
    parts = model.parts if model is not None else {}
    children = dict(enumerate(tree)) if isinstance(tree, tuple | list) else tree
    if not parts or not isinstance(children, dict):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf
        return
    for name in [*(n for n in parts if n in children), *(n for n in children if n not in parts)]:
        for inside, leaf in in_model_order(parts.get(name), children[name]):
            yield f"{name}/{inside}".rstrip("/"), leaf


def _sides(objective: Objective) -> tuple[Any, Any]:
    """The hand-written and the automatic way to (loss, gradient)."""

    def automatic(params: Params, batch: Batch, **given: Any) -> tuple[Array, PyTree]:
        return jax.value_and_grad(lambda params: objective(params, batch, **given))(params)

    manual = value_and_grad(objective)
    return lambda params, batch, **given: manual(params, batch, **given), automatic


def _dtypes(jaxpr: Any) -> set[np.dtype]:
    """The floating-point dtypes that a program computes in."""
    found = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for variable in equation.outvars:
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                found.add(jnp.dtype(dtype))
        for value in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                found |= _dtypes(value)
    return found


def _tolerance(dtypes: set[np.dtype]) -> float:
    """2 eps^(2/3) of the coarsest dtype: 5e-5 for float32, 8e-2 for bfloat16."""
    return 2 * max((float(jnp.finfo(d).eps) for d in dtypes), default=0.0) ** (2 / 3)


def _wide(tree: PyTree) -> PyTree:
    """Every floating-point leaf in float64."""

    def widen(leaf: Any) -> Any:
        return np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def _row(path: str, ours: Any, other: Any, tolerance: float, floor: float = 0.0) -> Row:
    """One leaf's comparison; a difference of at most `floor` is rounding, whatever its relation.

    Rounding differs from element to element and averages out: the norms must agree more closely.
    """
    a, b = (np.asarray(leaf, np.float64) for leaf in (ours, other))
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    sick = ~(np.isfinite(a) & np.isfinite(b))
    largest = float(np.abs(b).max(initial=0))
    worst = float(np.where(sick, np.inf, difference).max(initial=0))
    at = int(np.argmax(np.where(sick, np.inf, difference))) if a.size else 0
    place = [int(i) for i in np.unravel_index(at, a.shape)] if a.size else []
    relative = worst / largest if largest > 0 else (0.0 if worst == 0 else np.inf)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    with np.errstate(invalid="ignore"):  # of infinite gradients
        both = norms[0] * norms[1]
        cosine = float(np.vdot(a, b) / both) if both else float(norms[0] == norms[1])
        ratio = float(norms[0] / norms[1]) if norms[1] else float(norms[0] == 0 or np.inf)
    average = tolerance / min(4.0, max(1.0, a.size**0.5))
    close = relative <= tolerance and (abs(ratio - 1) <= average or worst == 0)
    return Row(
        path=path,
        shape=tuple(np.shape(other)),
        dtype=str(other.dtype),
        difference=worst,
        relative=float(relative),
        where=tuple(place),
        cosine=cosine,
        norm_ratio=ratio,
        agrees=not sick.any() and (close or worst <= floor),
        note="NaN or Inf in the gradient" if sick.any() else "",
    )


def _settled(row: Row, exact: Row) -> Row:
    """A row that differs by rounding alone agrees after all."""
    if row.agrees:
        return row
    note = f"rounding: in float64 the two differ by {exact.difference:.1e}"
    return dataclasses.replace(row, agrees=True, note=note)
