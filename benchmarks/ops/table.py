"""The rows of the op benchmark as a file to read and as one to update."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.measure import cores
from benchmarks.ops.case import SAMPLES, Row
from benchmarks.report import bold, machine, pair, version

LIMIT = 1.05

COLUMNS = (
    "op",
    "setting",
    "dtype",
    "ms",
    "time",
    "quartiles",
    "MB",
    "memory",
    "error",
    "autodiff's",
    "rms error",
    "autodiff's",
    "PyTorch",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"

EXPLANATION = """\
`{command}`, {date}. Every op and loss, forward and reverse together, jitted, by
hand : in the best form that we know an expert to write with `jax.numpy`, `jax.lax`, `jax.nn` and
Optax, under `jax.grad`. A setting says "against ..." where there are several such forms. Ratios are
ours / theirs: below 1 is faster or leaner.

- **time**: the median of {samples} ratios of times taken in turns, of 7 where a call takes long;
  half of the ratios lie between the quartiles.
- **memory**: what XLA allots beside arguments and results; 1.00 where both are below 1 kB, ∞ where
  theirs is 0.
- **error**: of output and gradients against float64, ours and autodiff's, of the array that is
  furthest off: its largest error over its largest element, and the root mean square of its errors
  over that of its elements. Means of four draws: one rounding more in the largest of many elements
  is luck, the root mean square is not. A rounding is 6e-8 in float32, 4e-3 in bfloat16.
- **PyTorch**: our time over that of the fastest layout it was given; where it has two, over the
  other one as well."""

FOOT = """\
{machine}. PyTorch
{torch} is eager, on {cores} threads, its CPU build, installed with pip beside the rest; it is no
dependency, and without it its column is empty."""


def above(name: str, rows: Sequence[Row], ratio: Callable[[Row], float | None]) -> str:
    """A sentence that lists the rows whose ratio is above the limit, the worst first."""
    found = [(float("inf") if ratio(row) is None else ratio(row), row) for row in rows]
    over = sorted((f for f in found if f[0] > LIMIT), key=lambda f: -f[0])
    names = [f"{row.op}, {row.setting}, {row.dtype} ({value:.2f})" for value, row in over]
    what = f"Above {LIMIT} in {name}: {len(over)} of {len(rows)}"
    return f"{what}.\n" + "".join(f"  - {each.replace('(inf)', '(∞)')}\n" for each in names)


def summary(rows: Sequence[Row]) -> str:
    """How many rows there are, and which of them lose."""
    beside = [row for row in rows if row.torch_time_ratio is not None]
    parts = [f"{len(rows)} rows.\n"]
    parts.append(above("time", rows, lambda row: row.time_ratio))
    parts.append(above("memory", rows, lambda row: row.memory_ratio))
    parts.append(above("root mean square error", rows, rms_ratio))
    worse = sum(row.error > LIMIT * row.autodiff_error for row in rows)
    better = sum(row.error * LIMIT < row.autodiff_error for row in rows)
    parts.append(
        f"Of the largest errors {worse} are above {LIMIT} of autodiff's, {better} are below it by "
        "as much.\n"
    )
    if beside:
        parts.append(above("time against PyTorch", beside, lambda row: row.torch_time_ratio))
    return "".join(f"- {part}" for part in parts)


def rms_ratio(row: Row) -> float | None:
    """Our error over autodiff's: 1 where both are exact, None where only autodiff's is."""
    if row.rms_error == row.autodiff_rms_error:
        return 1.0
    return row.rms_error / row.autodiff_rms_error if row.autodiff_rms_error else None


def line(r: Row) -> str:
    layouts = {r.torch_layout: r.torch_time_ratio, **r.torch_others}
    beside = ((f"({layout})" if layout else "", ratio) for layout, ratio in layouts.items())
    torch = ", ".join(f"{v:.2f} {layout}".rstrip() for layout, v in beside if v is not None)
    return (
        f"| {r.op} | {r.setting} | {r.dtype} | {pair(r.milliseconds, 2)} | {bold(r.time_ratio)} "
        f"| {r.time_low:.2f} to {r.time_high:.2f} | {pair(r.megabytes, 1)} "
        f"| {bold(r.memory_ratio)} | {r.error:.1e} | {r.autodiff_error:.1e} "
        f"| {r.rms_error:.1e} | {r.autodiff_rms_error:.1e} | {torch} |"
    )


def document(rows: Sequence[Row], command: str = "python -m benchmarks.ops") -> str:
    """The committed table: what it is, which rows lose, all rows, where they were measured."""
    dates = sorted({row.date for row in rows})
    date = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "nothing measured"
    head = EXPLANATION.format(command=command, date=date, samples=SAMPLES)
    foot = FOOT.format(machine=machine(), torch=version("torch") or "none", cores=cores())
    lines = "\n".join([HEAD, *map(line, rows)])
    return f"# Every op, by hand and by autodiff\n\n{head}\n\n{summary(rows)}\n{lines}\n\n{foot}\n"


def read(path: Path) -> list[Row]:
    """The rows of a file that was written here.

    Raises:
        SystemExit: if they were measured with something else: one table has one machine.
    """
    if not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["machine"] != machine():
        raise SystemExit(
            f"--update needs rows that were measured as they would be now, {machine()}; those of "
            f"{path} are of {stored['machine']}; measure all of them with --json"
        )
    return [
        Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in stored["rows"]
    ]


def merged(
    order: Iterable[tuple[str, str, str]], old: Sequence[Row], new: Sequence[Row]
) -> list[Row]:
    """New rows in the place of old ones, in the order of the cases; what is no case is gone."""
    known = {row.name: row for row in (*old, *new)}
    return [known[name] for name in order if name in known]
