"""What the benchmarks' tables have in common: how ratios are written, where they were taken."""

import dataclasses
import datetime
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Result, cores

LIBRARIES = ("jax", "jaxlib", "optax", "torch")


def machine() -> str:
    """Where and with what the figures were measured."""
    device = jax.devices()[0]
    kind = platform.machine() if device.platform == "cpu" else device.device_kind
    versions = [f"{name} {version(name)}" for name in LIBRARIES if version(name)]
    return (
        f"{device.platform} ({kind}, {cores()} cores), Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


def version(library: str) -> str | None:
    """Of an installed library; None where it is not."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def today() -> str:
    return datetime.date.today().isoformat()


def bold(ratio: float | None) -> str:
    """A ratio in a table: infinite where ours needs memory and theirs none."""
    return "**∞**" if ratio is None else f"**{ratio:.2f}**"


def pair(values: tuple[float, float], digits: int) -> str:
    """Ours : theirs."""
    return " : ".join(f"{value:.{digits}f}" for value in values)


def table(results: list[Result]) -> str:
    """A Markdown table, losing rows included; with errors where any were measured."""
    errors = any(r.error is not None for r in results)
    lines = [
        "| what | setting | against | ms | time | quartiles | MB | memory |"
        f"{' error |' if errors else ''}",
        f"|---|---|---|---|---|---|---|---|{'---|' if errors else ''}",
    ]
    for r in results:
        error = "" if r.error is None else f" {r.error[0]:.1e} : {r.error[1]:.1e}"
        lines.append(
            f"| {r.name} | {r.setting} | {r.against} | {pair(r.milliseconds, 2)} "
            f"| {bold(r.time_ratio)} | {r.time_low:.2f} to {r.time_high:.2f} "
            f"| {pair(r.megabytes, 1)} | {bold(r.memory_ratio)} |{error + ' |' if errors else ''}"
        )
    return "\n".join(lines)


def write(path: Path, **tables: list[Any]) -> None:
    """Tables of rows as JSON, by name, with where and when they were measured.

    The file is replaced whole: an interrupted run leaves the rows that it had.
    """
    plain = {name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}
    text = json.dumps({"machine": machine(), "date": today(), **plain}, indent=2)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)
