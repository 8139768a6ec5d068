"""A table: named columns of numbers or categories, and a numeric target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from backhand.data.batches import Rows
from backhand.data.split import split_rows


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of N rows, and the numeric target to predict from them.

    Attributes:
        columns: arrays of shape (N,) by name, in file order: floats, NaN where missing, for a
            numeric column; strings, "" where missing, for a categorical one.
        target: the name of the target.
        targets: its values, float of shape (N,), all finite.
        dropped: how many rows of the file were left out because their target was missing.

    Raises:
        ValueError: there is no row or no column, or an array is not as described.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    target: str
    targets: npt.NDArray[np.float64]
    dropped: int = 0

    def __post_init__(self) -> None:
        if not self.columns or self.targets.size == 0:
            raise ValueError(
                f"a table needs at least one column beside its target {self.target!r} and at least "
                f"one row, got columns {list(self.columns)} and {self.targets.size} rows"
            )
        if self.targets.ndim != 1 or not np.isfinite(self.targets).all():
            raise ValueError(
                f"the target {self.target!r} must be one finite number a row, got an array of "
                f"shape {self.targets.shape}; leave out the rows whose target is unknown"
            )
        for name, values in self.columns.items():
            if values.shape != self.targets.shape or values.dtype.kind not in "fU":
                raise ValueError(
                    f"column {name!r} must hold floats or strings of shape {self.targets.shape}, "
                    f"got {values.dtype} of shape {values.shape}"
                )
            if values.dtype.kind == "f" and np.isinf(values).any():
                raise ValueError(
                    f"column {name!r} must be finite, got an infinity; use NaN for unknown values"
                )

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.targets)

    def __str__(self) -> str:
        kinds = {"numeric": "f", "categorical": "U"}
        lines = [f"{len(self)} rows, target {self.target}"]
        for kind, code in kinds.items():
            names = [n for n, values in self.columns.items() if values.dtype.kind == code]
            lines.append(f"{kind}: {', '.join(names) or 'none'}")
        if self.dropped:
            lines.append(f"rows dropped for want of a target: {self.dropped}")
        return "\n".join(lines)

    def take(self, rows: Rows) -> "Table":
        """The table of the given row numbers, in their order."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Table(columns, self.target, self.targets[rows], self.dropped)

    def split(self, *, test_fraction: float, seed: SupportsIndex) -> tuple["Table", "Table"]:
        """Split at random into `(train, test)`, as `train_test_split` does for arrays."""
        train, test = split_rows(len(self), test_fraction=test_fraction, seed=seed)
        return self.take(train), self.take(test)
