"""Time and memory of two programs, side by side.

A noisy machine slows both sides alike: each sample times one right after the other, in turns, and
the figure is the median of their ratios.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a table: ours against theirs.

    Attributes:
        name: what was measured.
        setting: its shapes.
        against: what it was measured against.
        milliseconds: ours, and theirs: medians.
        time_ratio: the median of ours / theirs.
        megabytes: temporary memory, ours and theirs, as XLA allots it.
        memory_ratio: ours / theirs.
        error: of the gradient against float64, relative, ours and theirs; None if not measured.
    """

    name: str
    setting: str
    against: str
    milliseconds: tuple[float, float]
    time_ratio: float
    megabytes: tuple[float, float]
    memory_ratio: float
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
    memory = [c.memory_analysis().temp_size_in_bytes / 1e6 for c in compiled]
    milliseconds, ratio = in_turns(*compiled, *arguments, samples=samples, seconds=seconds)
    return Result(
        name,
        setting,
        against,
        milliseconds,
        ratio,
        (memory[0], memory[1]),
        memory[0] / memory[1] if memory[1] else 1.0,
    )


def in_turns(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *arguments: Any,
    samples: int = 15,
    seconds: float = 0.1,
) -> tuple[tuple[float, float], float]:
    """Median milliseconds of each of two functions, and the median of their ratios."""
    sides = (ours, theirs)
    counts = [max(1, round(seconds / _seconds(side, arguments, 3))) for side in sides]
    pairs = []
    for sample in range(samples):
        order = (0, 1) if sample % 2 == 0 else (1, 0)
        times = {side: _seconds(sides[side], arguments, counts[side]) for side in order}
        pairs.append((times[0], times[1]))
    medians = [1e3 * statistics.median(pair[side] for pair in pairs) for side in (0, 1)]
    return (medians[0], medians[1]), statistics.median(a / b for a, b in pairs)


def _seconds(function: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> float:
    """Seconds for one call, over `count` calls."""
    start = time.perf_counter()
    for _ in range(count):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def table(results: list[Result]) -> str:
    """A Markdown table, losing rows included; with errors where any were measured."""
    errors = any(r.error is not None for r in results)
    lines = [
        f"| what | setting | against | ms | time | MB | memory |{' error |' if errors else ''}",
        f"|---|---|---|---|---|---|---|{'---|' if errors else ''}",
    ]
    for r in results:
        error = "" if r.error is None else f" {r.error[0]:.1e} : {r.error[1]:.1e}"
        lines.append(
            f"| {r.name} | {r.setting} | {r.against} "
            f"| {r.milliseconds[0]:.2f} : {r.milliseconds[1]:.2f} | **{r.time_ratio:.2f}** "
            f"| {r.megabytes[0]:.1f} : {r.megabytes[1]:.1f} | **{r.memory_ratio:.2f}** |"
            f"{error + ' |' if errors else ''}"
        )
    return "\n".join(lines)


def machine() -> str:
    """Where and with what the figures were measured."""
    device = jax.devices()[0]
    return (
        f"{device.platform} ({platform.machine()}, {len(_cores())} cores), Python "
        f"{platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    )


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(1))


def write(results: list[Result], path: Path) -> None:
    """The results as JSON."""
    rows = [dataclasses.asdict(result) for result in results]
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
