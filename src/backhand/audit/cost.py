"""What a gradient costs by hand and automatically: time, memory, operations, residuals."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.result import Cost, Side
from backhand.audit.runs import Runs

SECONDS = 0.2
"""The time that both sides may take together."""

ROUNDS = 15


def cost(runs: Runs) -> Cost | None:
    """Both sides' costs in float32; None where there is no other way.

    Times are medians of runs that alternate between the sides, of a value and its gradient.
    """
    if not runs.has_own_reference:
        return None
    own, rest = runs.subject.at(jnp.float32)
    dy = runs.errors_like(jnp.float32, 0)
    sides = jax.jit(runs.subject.pull), jax.jit(runs.subject.automatic)
    compiled = [side.lower(own, rest, dy).compile() for side in sides]
    times = medians([functools.partial(program, own, rest, dy) for program in compiled])
    kept = manual_residuals(runs), automatic_residuals(runs)
    manual, automatic = (
        Side(milliseconds, temporary_bytes(program), flops(program), residuals)
        for milliseconds, program, residuals in zip(times, compiled, kept, strict=True)
    )
    return Cost(manual, automatic)


def medians(calls: list[Callable[[], Any]]) -> list[float]:
    """The median milliseconds of each call, the calls taken in turn."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    begin = time.perf_counter()
    while len(taken[0]) < 3 or (len(taken[0]) < ROUNDS and time.perf_counter() - begin < SECONDS):
        for call, own in zip(calls, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in taken]


def temporary_bytes(compiled: Any) -> int | None:
    """XLA's scratch memory of a compiled program; None where the backend does not say."""
    try:
        return int(compiled.memory_analysis().temp_size_in_bytes)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None


def flops(compiled: Any) -> float | None:
    """XLA's count of floating-point operations; None where the backend does not say."""
    try:
        return float(compiled.cost_analysis()["flops"])
    except (KeyError, NotImplementedError, RuntimeError, TypeError):
        return None


def manual_residuals(runs: Runs) -> dict[str, int]:
    """The bytes of what the hand-written forward keeps, by path among its residuals."""
    subject, rule = runs.subject, runs.subject.rule
    own, rest = subject.at(jnp.float32)
    if rule is None:
        return _by_shape(_kept(subject.value, own, rest))
    forward = rule.forward
    residuals = jax.eval_shape(lambda o, r: _arrays(forward(*subject.rebuild(o, r))[1]), own, rest)
    return _bytes(residuals)


def automatic_residuals(runs: Runs) -> dict[str, int]:
    """The bytes of what JAX keeps of the reference, by shape: it gives them no names."""
    own, rest = runs.subject.at(jnp.float32)
    return _by_shape(_kept(runs.subject.reference_value, own, rest))


def _kept(side: Callable[..., Any], own: Any, rest: Any) -> Any:
    """The shapes of what JAX keeps between a forward and its reverse."""
    return jax.eval_shape(lambda o, r: jax.vjp(lambda o: side(o, r), o)[1], own, rest)


def _arrays(tree: Any) -> Any:
    """The arrays of residuals; what else they hold costs nothing."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, tree)


def _bytes(tree: Any) -> dict[str, int]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "residuals": _size(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _by_shape(tree: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        name = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        found[name] = found.get(name, 0) + _size(leaf)
    return found


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * getattr(leaf.dtype, "itemsize", 8)
