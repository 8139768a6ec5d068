"""Time and memory of two programs, side by side.

A noisy machine slows both sides alike: each sample times one right after the other, in turns, and
the figure is the median of their ratios.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Times of two functions in turns.

    Attributes:
        milliseconds: ours, and theirs: medians.
        ratio: the median of ours / theirs over pairs of times.
        low, high: the quartiles of ours / theirs: half of the pairs lie between them.
    """

    milliseconds: tuple[float, float]
    ratio: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a table: ours against theirs.

    Attributes:
        name: what was measured.
        setting: its shapes.
        against: what it was measured against.
        milliseconds: ours, and theirs: medians.
        time_ratio: the median of ours / theirs.
        time_low, time_high: the quartiles of ours / theirs.
        megabytes: temporary memory, ours and theirs, as XLA allots it.
        memory_ratio: ours / theirs; see `memory_ratio`.
        error: of the gradient against float64, relative, ours and theirs; None if not measured.
    """

    name: str
    setting: str
    against: str
    milliseconds: tuple[float, float]
    time_ratio: float
    time_low: float
    time_high: float
    megabytes: tuple[float, float]
    memory_ratio: float | None
    error: tuple[float, float] | None = None


def side_by_side(
    name: str,
    setting: str,
    against: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *arguments: Any,
    samples: int = 15,
    seconds: float = 0.1,
) -> Result:
    """Times and sizes two functions of the same arguments, both jitted.

    Args:
        name, setting, against: for the table.
        ours, theirs: functions of `arguments`.
        arguments: pytrees of arrays.
        samples: how many pairs of times are taken.
        seconds: how long one time is taken over.
    """
    compiled = [jax.jit(f).lower(*arguments).compile() for f in (ours, theirs)]
    timing = in_turns(*compiled, *arguments, samples=samples, seconds=seconds)
    mine, other = (temporary(c) for c in compiled)
    return Result(
        name, setting, against, *timing, (mine / 1e6, other / 1e6), memory_ratio(mine, other)
    )


def temporary(compiled: Any) -> int:
    """Bytes that XLA allots beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def memory_ratio(ours: int, theirs: int) -> float | None:
    """Ours / theirs, in bytes: 1 where both are below a kilobyte, None where only theirs is 0."""
    if max(ours, theirs) < 1000:
        return 1.0
    return ours / theirs if theirs else None


def in_turns(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *arguments: Any,
    samples: int = 15,
    seconds: float = 0.1,
) -> Timing:
    """Times two functions of `arguments` one right after the other, in turns.

    What takes longer than `seconds` is called once a time, and then 7 pairs are enough.
    """
    sides = (ours, theirs)
    once = [_warm_seconds(side, arguments) for side in sides]
    counts = [max(1, round(seconds / own)) for own in once]
    if min(once) > seconds:
        samples = min(samples, 7)
    pairs = []
    for sample in range(samples):
        order = (0, 1) if sample % 2 == 0 else (1, 0)
        times = {side: _seconds(sides[side], arguments, counts[side]) for side in order}
        pairs.append((times[0], times[1]))
    medians = [1e3 * statistics.median(pair[side] for pair in pairs) for side in (0, 1)]
    ratios = [a / b for a, b in pairs]
    quartiles = statistics.quantiles(ratios, method="inclusive") if samples > 1 else ratios * 3
    low, middle, high = quartiles
    return Timing((medians[0], medians[1]), middle, low, high)


def _warm_seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Seconds for one call, after one that is not counted; over 3 where they are short."""
    _seconds(function, arguments, 1)
    once = _seconds(function, arguments, 1)
    return once if once > 0.1 else _seconds(function, arguments, 3)


def _seconds(function: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> float:
    """Seconds for one call, over `count` calls."""
    start = time.perf_counter()
    for _ in range(count):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
