"""The result of a comparison: a row for each leaf, a verdict, a table to read."""

import dataclasses
import math
import textwrap
from typing import Any

import numpy as np

from backhand.audit.result import Cause


@dataclasses.dataclass(frozen=True)
class Row:
    """How one leaf of two gradients compares.

    Attributes:
        path: where the leaf is in the parameters, as in "hidden/w".
        shape: of the leaf.
        dtype: of the leaf.
        difference: the largest absolute difference.
        relative: that over the largest magnitude in the second gradient's leaf; 0 for two zeros.
        where: the index of the largest difference; empty for a leaf without elements.
        cosine: of the angle between the two; 1 for two zeros, 0 where one alone is zero.
        norm_ratio: the norm of the first over that of the second; 1 for two zeros.
        agrees: whether the relative difference is within the tolerance, or rounding explains it.
        note: why it agrees or not, where the numbers alone do not say.
        cause: how it is wrong; None where it agrees.
        gradients: the two, for a picture of their difference; not in `to_dict`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    difference: float
    relative: float
    where: tuple[int, ...]
    cosine: float
    norm_ratio: float
    agrees: bool
    note: str = ""
    cause: Cause | None = None
    gradients: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def stacked(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The two gradients under S errors of the output, (S, *shape), if they are kept."""
        if self.gradients is None or np.ndim(self.gradients[1]) != len(self.shape):
            return self.gradients
        ours, other = self.gradients
        return ours[None], other[None]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain Python values, without the gradients."""
        values = dataclasses.asdict(dataclasses.replace(self, gradients=None))
        del values["gradients"]
        return values


@dataclasses.dataclass(frozen=True)
class Report:
    """The leaf-by-leaf comparison of two gradients; printing it gives a table.

    Attributes:
        rows: one for each leaf, in the order of the model's layers.
        names: what the two gradients are called.
        values: the two losses; of an output that is no single number, its norms.
        scalar: whether the output is a single number.
        tolerance: the relative difference up to which a leaf agrees.
        outputs_agree: whether the values do, element by element; None to hold `values` against the
            tolerance.
        agrees: the verdict: every leaf does, and so do the losses.
    """

    rows: tuple[Row, ...]
    names: tuple[str, str]
    values: tuple[float, float]
    tolerance: float
    outputs_agree: bool | None = None
    scalar: bool = True

    @property
    def agrees(self) -> bool:
        """Whether every leaf and the losses agree."""
        return self.values_agree and all(row.agrees for row in self.rows)

    @property
    def values_agree(self) -> bool:
        """Whether the two losses agree."""
        if self.outputs_agree is not None:
            return self.outputs_agree
        a, b = self.values
        return a == b or abs(a - b) <= self.tolerance * max(abs(a), abs(b))

    def assert_close(self) -> None:
        """Passes if the gradients agree.

        Raises:
            AssertionError: with the table, if they do not.
        """
        if not self.agrees:
            raise AssertionError(f"the gradients differ\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as plain Python values, ready for JSON."""
        return {
            "agrees": self.agrees,
            "values_agree": self.values_agree,
            "tolerance": self.tolerance,
            "values": dict(zip(self.names, self.values, strict=True)),
            "rows": [row.to_dict() for row in self.rows],
        }

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        from backhand.audit.html import of_report

        return of_report(self)

    def __str__(self) -> str:
        """A table of at most 100 columns."""
        head = ("leaf", "shape", "dtype", "max diff", "relative", "at", "cosine", "norms", "")
        table = [head] + [_cells(row) for row in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        widths[0] = min(widths[0], 100 - sum(widths[1:]) - 2 * (len(head) - 1))
        lines = ["  ".join(_fit(c, w) for c, w in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        notes = [
            line
            for row in self.rows
            for text in (row.note, row.cause.message if row.cause else "")
            if text
            for line in textwrap.wrap(f"{row.path}: {text}", 100, subsequent_indent="    ")
        ]
        return "\n".join(
            [line.rstrip() for line in lines] + notes + textwrap.wrap(self.verdict, 100)
        )

    @property
    def verdict(self) -> str:
        """In one line, whether the gradients agree."""
        worst = max((row.relative for row in self.rows if not row.note), default=0.0)
        count = sum(not row.agrees for row in self.rows)
        first, second = self.names
        if self.agrees:
            settled = sum(bool(row.note) for row in self.rows)
            return (
                f"{first} and {second} gradients agree in all {len(self.rows)} leaves: "
                f"relative difference {worst:.1e}, tolerance {self.tolerance:.1e}"
                + (f"; {settled} by float64" if settled else "")
            )
        sizes = f"{first} {self.values[0]!r}, {second} {self.values[1]!r}"
        values = f"values DIFFER: {sizes}" if self.scalar else f"outputs DIFFER; norms: {sizes}"
        if count:
            leaves = f"{first} and {second} gradients DIFFER in {count} of {len(self.rows)} leaves"
            return leaves if self.values_agree else f"{leaves}, and the {values}"
        return f"the gradients agree, but the {values}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path,
        "x".join(map(str, row.shape)) or "scalar",
        row.dtype,
        f"{row.difference:.1e}",
        f"{row.relative:.1e}",
        ",".join(map(str, row.where)),
        f"{row.cosine:.6f}",
        f"{row.norm_ratio:.6f}" if math.isfinite(row.norm_ratio) else str(row.norm_ratio),
        "agrees" if row.agrees else "DIFFERS",
    )


def _fit(text: str, width: int) -> str:
    """Text in a column; a path that is too long loses its beginning."""
    return text.ljust(width) if len(text) <= width else "…" + text[len(text) - width + 1 :]
