"""Every op, forward and reverse together, against autodiff and, where installed, PyTorch.

    python -m benchmarks.ops [--only PATTERN] [--json FILE] [--markdown FILE]
    python -m benchmarks.ops [--only PATTERN] --update FILE [--missing | --errors] [--markdown FILE]

Ratios are ours / theirs: below 1 is faster or leaner. Memory is what XLA allots beside arguments
and results. Errors are of output and gradients against float64; --errors measures them alone.
A file of rows is written after each of them, so that an interrupted run goes on with --missing.
"""

import argparse
import re
from pathlib import Path

from benchmarks.ops import cases
from benchmarks.ops.case import measure, with_errors
from benchmarks.ops.table import HEAD, document, line, merged, read, summary
from benchmarks.report import machine, today, write


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help='cases whose "op, setting, dtype" matches'
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--missing", action="store_true", help="cases that --update's FILE lacks")
    some.add_argument(
        "--errors", action="store_true", help="of the rows in --update's FILE, and nothing else"
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    files.add_argument("--update", type=Path, metavar="FILE", help="replace these rows in FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE")
    given = parser.parse_args()
    if (given.missing or given.errors) and not given.update:
        parser.error("--missing and --errors need --update FILE: the rows that there are")
    return given


def main() -> None:
    given = arguments()
    every = list(cases())
    order = [case.name for case in every]
    old = read(given.update) if given.update else []
    there = {row.name: row for row in old}
    rows, file = merged(order, old, []), given.update or given.json
    print(HEAD, flush=True)
    for case in every:
        known = case.name in there
        if (given.missing and known) or (given.errors and not known):
            continue
        if not re.search(given.only, ", ".join(case.name)):
            continue
        row = with_errors(there[case.name], case) if given.errors else measure(case, today())
        print(line(row), flush=True)
        rows = merged(order, rows, [row])
        if file:
            write(file, rows=rows)
    print(f"\n{summary(rows)}\n{machine()}")
    if given.markdown:
        given.markdown.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
