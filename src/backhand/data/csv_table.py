"""A reader of CSV files that says what is wrong in them, and on which line."""

import csv
import math
import os
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backhand.data.table import Table

MISSING = frozenset({"", "na", "n/a", "nan", "null", "?", "-"})
_NUMBER = re.compile(
    r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|inf(inity)?)", re.ASCII | re.IGNORECASE
)
# A number with a currency sign, separators or a per cent sign: meant as one, but not read as one.
_DECORATED = re.compile(r"[+-]?[$€£¥]?\s?[+-]?(\d+|\d{1,3}([,.'’_\s]\d{3})+)([.,]\d+)?\s?[%$€£¥]?")


def read_table(
    path: str | os.PathLike[str],
    *,
    target: str,
    numeric: Collection[str] = (),
    categorical: Collection[str] = (),
    ignore: Collection[str] = (),
    delimiter: str = ",",
) -> Table:
    r"""Read a CSV file with a header row: one numeric target, every other column a feature.

    A column is **numeric** if at least half of its cells that are not missing are numbers, and
    then a cell of text in it is an error; otherwise it is **categorical**. So a few stray cells
    never turn numbers into categories unseen. `numeric` and `categorical` overrule this by name;
    codes that look like numbers (a postcode) belong in `categorical`.

    A number is written 12, -1.5 or 2e3. One with a currency sign, a thousands separator, a decimal
    comma or a per cent sign counts as a number above, and is then an error. A cell is **missing**
    if it is empty or NA, N/A, nan, null, ? or -, in any case. Rows whose target is missing are
    dropped and counted in `Table.dropped`. A column without any value is categorical. Blank lines
    and the spaces around a cell are ignored; quoted cells, CRLF and a byte order mark are read.

    Args:
        path: a file in UTF-8.
        target: the name of the column to predict.
        numeric: columns to read as numbers, whatever their cells.
        categorical: columns to read as categories, whatever their cells.
        ignore: columns to leave out.
        delimiter: what stands between cells, one character.

    Returns:
        A `Table` in file order. `fit_encoder` makes arrays of it.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is not such a table; the message names the line as an editor counts
            it, the column and the cell.

    Example:
        >>> import pathlib, tempfile
        >>> from backhand.data import read_table
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "houses.csv")
        ...     _ = path.write_text("area,zone,price\n80,north,200\n?,south,300\n95,north,NA\n")
        ...     table = read_table(path, target="price")
        >>> print(table)
        2 rows, target price
        numeric: area
        categorical: zone
        rows dropped for want of a target: 1
        >>> table.columns["area"], table.targets
        (array([80., nan]), array([200., 300.]))
    """
    file = _read_file(Path(path), delimiter)
    chosen = {"numeric": numeric, "categorical": categorical, "ignore": ignore}
    _check_names(file, target, chosen)

    target_index = file.header.index(target)
    rows = [row for row in file.rows if not _is_missing(row.cells[target_index])]
    if not rows:
        raise ValueError(f"{file.path} has no row whose target {target!r} is given; fill some in")

    columns: dict[str, npt.NDArray[Any]] = {}
    for index, name in enumerate(file.header):
        if name == target or name in ignore:
            continue
        cells = [row.cells[index] for row in rows]
        if name in numeric or (name not in categorical and _looks_numeric(cells)):
            remedy = f", or pass categorical=({name!r},) if the column holds categories"
            columns[name] = _numbers(file, rows, index, remedy)
        else:
            columns[name] = np.array(["" if _is_missing(cell) else cell for cell in cells])
    targets = _numbers(file, rows, target_index, "")
    return Table(columns, target, targets, dropped=len(file.rows) - len(rows))


class _Row(NamedTuple):
    """The cells of a row, and the line of the file that it starts on."""

    line: int
    cells: list[str]


class _File(NamedTuple):
    """A CSV file as text."""

    path: Path
    header: list[str]
    rows: list[_Row]


def _read_file(path: Path, delimiter: str) -> _File:
    """Read the cells of a file, and check that they form a rectangle under a header."""
    rows: list[_Row] = []
    line = 1
    try:
        # utf-8-sig drops a byte order mark, and newline="" leaves CRLF to the csv module.
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            for cells in reader:
                stripped = [cell.strip() for cell in cells]
                if stripped not in ([], [""]):
                    rows.append(_Row(line, stripped))
                line = reader.line_num + 1
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"read_table found no file at {path}; a relative path starts from {Path.cwd()}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, got the byte {error.object[error.start]:#04x}; "
            "save it again as CSV in UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: the row is not valid CSV ({error}); "
            'a quoted cell ends with a quote, and a quote within it is doubled ("")'
        ) from error

    if not rows:
        raise ValueError(f"{path} is empty; it needs a header row, and rows under it")
    header = rows[0].cells
    if len(rows) == 1:
        raise ValueError(f"{path} has a header, {header}, and no row under it; add some rows")
    for row in rows:
        if len(row.cells) != len(header):
            raise ValueError(
                f"{path}, line {row.line}: a row needs {len(header)} cells, as many as the "
                f"header, got {len(row.cells)}; quote a cell that contains {delimiter!r}, "
                "and leave one that is not known empty"
            )
    return _File(path, header, rows[1:])


def _check_names(file: _File, target: str, chosen: Mapping[str, Collection[str]]) -> None:
    """Check that the header is sound, and that the names that the caller gave fit it."""
    header = file.header
    if "" in header:
        raise ValueError(
            f"{file.path}: every column needs a name, got none for column "
            f"{header.index('') + 1}; name it in the header, or remove it"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{file.path}: column names must differ, got {twice} twice; rename one")
    if target not in header:
        hint = "; pass the delimiter that the file uses" if len(header) == 1 else ""
        raise ValueError(
            f"{file.path} has no column {target!r} for the target; its columns are {header}{hint}"
        )
    given: dict[str, str] = {target: "target"}
    for option, names in chosen.items():
        if isinstance(names, str):
            raise ValueError(
                f"{option} takes a tuple of names, got the string {names!r}; pass ({names!r},)"
            )
        for name in names:
            if name not in header:
                raise ValueError(
                    f"{file.path} has no column {name!r} for {option}; its columns are {header}"
                )
            if given.setdefault(name, option) != option:
                raise ValueError(
                    f"column {name!r} may be given once, got it for {given[name]} and {option}"
                )
    if len(set(header) - {target} - set(chosen["ignore"])) == 0:
        raise ValueError(f"{file.path} needs a column to predict {target!r} from, got {header}")


def _is_missing(cell: str) -> bool:
    """Whether a cell says that its value is not known."""
    return cell.lower() in MISSING


def _looks_numeric(cells: list[str]) -> bool:
    """Whether at least half of the cells that are not missing are meant as numbers."""
    present = [cell for cell in cells if not _is_missing(cell)]
    meant = sum(bool(_NUMBER.fullmatch(c) or _DECORATED.fullmatch(c)) for c in present)
    return 0 < len(present) <= 2 * meant


def _numbers(file: _File, rows: list[_Row], index: int, remedy: str) -> npt.NDArray[np.float64]:
    """A column as floats, NaN where missing; an error names the first cell that is not one."""
    values = np.empty(len(rows))
    for i, row in enumerate(rows):
        cell = row.cells[index]
        if _is_missing(cell):
            values[i] = math.nan
            continue
        place = f"{file.path}, line {row.line}, column {file.header[index]!r}"
        if not _NUMBER.fullmatch(cell):
            write = "write it as 1234.5" if _DECORATED.fullmatch(cell) else "correct the cell"
            raise ValueError(
                f"{place}: needs a number, got {reprlib.repr(cell)}; {write}, "
                f"leave it empty if it is not known{remedy}"
            )
        values[i] = float(cell)
        if not math.isfinite(values[i]):
            raise ValueError(
                f"{place}: needs a finite number, got {reprlib.repr(cell)}; "
                "leave the cell empty if it is not known"
            )
    return values
