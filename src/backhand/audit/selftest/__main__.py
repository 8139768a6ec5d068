"""Does the audit find bugs? Plants every kind in every row of the catalogue, and counts.

    python -m backhand.audit.selftest [--json FILE] [--markdown FILE] [--rows PATTERN] [--quick]
        [--processes N] [--verbose]

The verdict is that of `bh.check`. Truth, right passes and programs are made once a row and size, so
that the whole takes minutes; and every right row goes through `bh.check` once, with all of its
checks. A row that has another setting of an op seen before has one size, even and odd in turn. The
exit status is 1 if a target is missed; see `Tally.failures`.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from backhand.audit.selftest.run import selftest
from backhand.audit.selftest.table import markdown, written
from backhand.catalogue import ROWS

QUICK = 8
"""Every which row is taken by --quick."""


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
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="rows at a time, by default 1"
    )
    parser.add_argument("--verbose", action="store_true", help="a line a row, and what was missed")
    given = parser.parse_args(None if argv is None else list(argv))
    rows = [row for row in ROWS if re.search(given.rows, repr(row))]
    rows = rows[::QUICK] if given.quick and not given.rows else rows
    if given.processes < 1:
        parser.error(f"--processes needs at least 1, got {given.processes}")
    if not rows:
        parser.error(
            f"--rows {given.rows}: no row of the catalogue matches; names are like {ROWS[0]!r}"
        )
    begin = time.perf_counter()
    say = (lambda line: print(line, flush=True)) if given.verbose else (lambda line: None)
    tally, rival = selftest(rows, given.quick, say, given.processes)
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
