"""What a gradient costs by hand and automatically: time, memory, operations, residuals."""

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.result import Cost, Side
from backhand.audit.runs import Runs

SECONDS = 0.2
"""The time that both sides may take together."""

ROUNDS = 15


class Programs:
    """Both sides' programs in float32, compiled in the background from now on.

    They are compiled as they are used, at XLA's full length: half of an audit's time, or more.

    Args:
        runs: the subject's.
    """

    def __init__(self, runs: Runs):
        own, rest = runs.subject.at(jnp.float32)
        self.given = own, rest, runs.errors_like(jnp.float32, 0)
        sides = (runs.subject.pull, runs.subject.automatic) if runs.has_own_reference else ()
        # One thread: the audit itself keeps another core busy.
        self._pool = ThreadPoolExecutor(1)
        self._compiled = [
            self._pool.submit(jax.jit(side).lower(*self.given).compile) for side in sides
        ]

    def __enter__(self) -> "Programs":
        """Itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Drops what has not begun to compile."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def compiled(self) -> list[Any]:
        """The programs, none where there is no other way."""
        return [program.result() for program in self._compiled]


def cost(runs: Runs, programs: Programs | None = None) -> Cost | None:
    """Both sides' costs in float32; None where there is no other way.

    Times are medians of runs that alternate between the sides, of a value and its gradient.
    """
    if not runs.has_own_reference:
        return None
    programs = programs or Programs(runs)
    compiled = programs.compiled()
    times = medians([functools.partial(program, *programs.given) for program in compiled])
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
