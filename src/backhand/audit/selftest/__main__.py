"""Does the audit find bugs? Plants every kind in every row of the catalogue, and counts.

    python -m backhand.audit.selftest [--json FILE] [--markdown FILE] [--rows PATTERN] [--quick]
        [--verbose]

The verdict is that of `bh.check`. Truth, right passes and programs are made once a row and size, so
that the whole takes minutes; and every right row goes through `bh.check` once, with all of its
checks. A row that has another setting of an op seen before has one size, even and odd in turn. The
exit status is 1 if a target is missed; see `Tally.failures`.
"""

import argparse
import collections
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from backhand.arrays import is_floating
from backhand.audit.check import check
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.outcome import correct, outcome
from backhand.audit.selftest.rival import Rival
from backhand.audit.selftest.table import markdown, written
from backhand.audit.selftest.tally import Tally
from backhand.audit.selftest.trial import DTYPES, Trial
from backhand.catalogue import ROWS, Row

EVEN, ODD = {"B": 16}, {"B": 5}
"""The lengths of the batch; of other axes that may be of any length, 4 and 7."""

SEEDS, SEEDS_AGAIN = 8, 2
"""How many points a right pass is audited at, and one with another setting of an op seen before."""

QUICK = 8
"""Every which row is taken by --quick."""


def sizes_of(row: Row, quick: bool = False) -> Iterator[dict[str, int]]:
    """An even and an odd size of a row, and those at its borders.

    Only axes that the row says may be of another length get one.

    Example:
        >>> list(sizes_of(ROWS[0], quick=True))
        [{'B': 16, 'D': 4, 'I': 4}, {'B': 5, 'D': 7, 'I': 7}]
    """
    free = dict.fromkeys(axis for edge in row.edges for axis in edge if axis != "B")
    for batch, length in ((EVEN, 4), (ODD, 7)):
        every = batch | dict.fromkeys(free, length)
        yield every if _runs(row, every) else batch
    if not quick:
        yield from map(dict, row.edges)


def _runs(row: Row, sizes: Mapping[str, int]) -> bool:
    """Whether a row takes arguments of a size."""
    try:
        jax.eval_shape(lambda: row.reference(*row.arguments(jnp.float32, **sizes)))
    except (TypeError, ValueError):
        return False
    return True


def selftest(
    rows: Sequence[Row] = ROWS, quick: bool = False, say: Callable[[str], Any] = lambda line: None
) -> tuple[Tally, Rival]:
    """Plants every bug in every row, at an even and at an odd size, and counts what is found.

    Args:
        rows: of the catalogue.
        quick: fewer sizes and seeds, and no `check_grads`.
        say: takes a line for each row.

    Returns:
        The counts, and those of `check_grads` on a sample.
    """
    tally, rival, seen = Tally(), Rival(), collections.Counter[str]()
    for number, row in enumerate(rows):
        begin = time.perf_counter()
        if not any(map(is_floating, jax.tree.leaves(jax.eval_shape(row.arguments)))):
            continue  # integers alone have no gradient
        failures = check(row, costs=False).failures
        tally.audit(repr(row), [f"{found.check} {found.message}" for found in failures])
        places = list(enumerate(sizes_of(row, quick)))
        again, seen[row.name] = seen[row.name], seen[row.name] + 1
        for place, sizes in places[again % 2 : again % 2 + 1] if again else places:
            trial = Trial(row, **sizes)
            seeds = SEEDS_AGAIN if again else SEEDS
            _audit_right(tally, trial, 1 if quick or place > 1 else seeds)
            if place < 2:
                _audit_wrong(tally, trial)
                if not quick and not again:
                    rival.add(trial, 2 * number + place)
        if not quick:
            jax.clear_caches()  # no row's programs are used by another
        say(f"{row!r}: {time.perf_counter() - begin:.1f} s")
    return tally, rival


def _audit_right(tally: Tally, trial: Trial, seeds: int) -> None:
    for seed in range(seeds):
        for dtype in DTYPES:
            tally.right(dtype.name, repr(trial), correct(trial, dtype, seed))


def _audit_wrong(tally: Tally, trial: Trial) -> None:
    for bug in BUGS.values():
        for site in trial.sites[:1] if bug.whole else trial.sites:
            wrong = trial.wrong(bug, site)
            if wrong is None:
                continue
            for dtype in DTYPES:
                said = outcome(trial, dtype, wrong)
                tally.bug(dtype.name, bug.kind, repr(trial), said, bug.causes)


def main(argv: Iterable[str] | None = None) -> int:
    """The command: prints a table, writes files, and gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m backhand.audit.selftest", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="writes the counts")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        type=Path,
        help="writes the table, between the marks of a document that has them",
    )
    parser.add_argument("--rows", metavar="PATTERN", default="", help="rows that match, by name")
    parser.add_argument(
        "--quick", action="store_true", help="a sample of rows, without check_grads"
    )
    parser.add_argument("--verbose", action="store_true", help="a line a row, and what was missed")
    given = parser.parse_args(None if argv is None else list(argv))
    rows = [row for row in ROWS if re.search(given.rows, repr(row))]
    rows = rows[::QUICK] if given.quick and not given.rows else rows
    if not rows:
        parser.error(
            f"--rows {given.rows}: no row of the catalogue matches; names are like {ROWS[0]!r}"
        )
    begin = time.perf_counter()
    say = (lambda line: print(line, flush=True)) if given.verbose else (lambda line: None)
    tally, rival = selftest(rows, given.quick, say)
    table = markdown(tally, rival, len(rows), time.perf_counter() - begin)
    for line in [*tally.missed, *tally.unnamed] if given.verbose else []:
        print(line)
    for failed in tally.failed:
        print(f"bh.check: false alarm in {failed}")
    for dtype, where in tally.alarms.items():
        print(f"{dtype}: false alarm in {', '.join(where)}")
    print(table)
    for failure in tally.failures:
        print(f"MISSED  {failure}")
    if given.json is not None:
        given.json.write_text(json.dumps(tally.to_dict(), indent=1) + "\n", encoding="utf-8")
    if given.markdown is not None:
        file = given.markdown
        document = file.read_text(encoding="utf-8") if file.exists() else ""
        file.write_text(written(document, table), encoding="utf-8")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
