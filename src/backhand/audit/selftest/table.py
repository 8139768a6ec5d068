"""The table of a self-test: kinds of bugs against detectors, in Markdown."""

import collections
import datetime
import os
import platform
from collections.abc import Iterator

import jax
import numpy as np

from backhand.audit.selftest.rival import SAMPLED, Rival
from backhand.audit.selftest.tally import Tally

BOTH = ("float32", "float64")

BEGIN, END = "<!-- begin self-test -->", "<!-- end self-test -->"
"""What the table stands between in a document."""


def written(document: str, table: str) -> str:
    """A document with another table between its marks; without marks, the table alone.

    Example:
        >>> written(f"Before {BEGIN} old {END} after", "new").count("new")
        1
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}" if begin and end else table


def markdown(tally: Tally, rival: Rival, rows: int, seconds: float) -> str:
    """Totals, then a line a kind with `check_grads` beside it, and where it was measured.

    Args:
        tally: the counts.
        rival: those of `check_grads`.
        rows: how many rows of the catalogue were used.
        seconds: how long it took.
    """
    return "\n".join(
        [*_totals(tally), "", *_kinds(tally, rival), "", *_notes(rival, rows, seconds)]
    )


def _totals(tally: Tally) -> Iterator[str]:
    names = ("planted", "caught", "leaf_named", "cause_named", "correct", "false_alarms")
    yield from _head(["", *(name.replace("_", " ") for name in names)])
    for dtype in tally.dtypes:
        counts = tally.totals(dtype)
        yield _line([dtype, *(str(counts[name]) for name in names)])
    yield _line(["`bh.check`, every check", *[""] * 4, str(tally.audits), str(len(tally.failed))])


def _kinds(tally: Tally, rival: Rival) -> Iterator[str]:
    beside = bool(rival.correct)
    head = ["bug", *(f"{part}, {d}" for d in BOTH for part in ("caught", "cause")), "named as"]
    step = rival.best("float32")
    if beside:
        head += [f"check_grads, {dtype}" for dtype in BOTH]
        head += [f"float32, step {step:g}"] if step is not None else []
    yield from _head(head)
    for kind in dict.fromkeys(kind for _, kind in tally.kinds):
        cells = [kind]
        for dtype in BOTH:
            count = tally.kinds.get((dtype, kind))
            if count is None:
                cells += ["", ""]
            else:
                cells += [
                    f"{count.caught} of {count.planted}",
                    _share(count.cause_named, count.caught),
                ]
        cells.append(_named(tally, kind))
        if beside:
            settings: list[tuple[str, float | None]] = [("float32", None), ("float64", None)]
            settings += [("float32", step)] if step is not None else []
            for dtype, at in settings:
                planted, caught = rival.bugs.get((dtype, kind, at), (0, 0))
                cells.append(f"{caught} of {planted}" if planted else "")
        yield _line(cells)
    if beside:
        alarms = [
            f"{rival.alarms[dtype, at]} of {rival.correct[dtype]}"
            for dtype, at in (("float32", None), ("float64", None), ("float32", step))
        ]
        ours = []
        for dtype in BOTH:
            counts = tally.totals(dtype)
            ours += [f"{counts['false_alarms']} of {counts['correct']}", ""]
        yield _line(["**false alarms**", *ours, "", *alarms[: 3 if step is not None else 2]])


def _named(tally: Tally, kind: str) -> str:
    """The two causes that a kind of bug is named as most often."""
    causes = collections.Counter[str]()
    for dtype in BOTH:
        if (count := tally.kinds.get((dtype, kind))) is not None:
            causes += count.causes
    return ", ".join(
        f"{cause} {_share(count, causes.total())}" for cause, count in causes.most_common(2)
    )


def _notes(rival: Rival, rows: int, seconds: float) -> Iterator[str]:
    if rival.correct:
        given = rival.correct["float64"]
        yield (
            f"`check_grads` is given one bug in {SAMPLED}, and {given} of the "
            f"{given + rival.left_out} right passes at the even and the odd size. It is spared "
            "those that it fails in float64 too, where the gradient is not the derivative by "
            "design: frozen parameters, running statistics, casts. Integers and keys, which it "
            "raises on, are closed over."
        )
        yield ""
    machine = f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores"
    versions = f"jax {jax.__version__}, NumPy {np.__version__}"
    date = datetime.date.today().isoformat()
    yield (
        f"{rows} rows of the catalogue, {seconds:.0f} s; {machine}, {jax.default_backend()}, "
        f"Python {platform.python_version()}, {versions}, {date}."
    )
    yield ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _head(cells: list[str]) -> Iterator[str]:
    yield _line(cells)
    yield _line(["---"] * len(cells))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
