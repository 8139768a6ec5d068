"""From a table to float32 arrays, with statistics of the training rows alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backhand.data.table import Table

Values = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Numeric:
    """How a numeric column is encoded: (x - mean) / std, and 0 where x is missing.

    Attributes:
        mean: the mean of the training values.
        std: their standard deviation; 0 for a constant column, which is encoded as zeros.
        indicator: whether a second column says where values are missing: it does if some were in
            training.
    """

    mean: float
    std: float
    indicator: bool

    def features(self, name: str) -> tuple[str, ...]:
        """The names of the encoded columns."""
        return (name, f"{name} is missing") if self.indicator else (name,)

    def encode(self, values: Values) -> Floats:
        """Encode float values of shape (N,), NaN where missing, as (N, 1) or (N, 2)."""
        missing = np.isnan(values)
        if self.std == 0:
            scaled = np.zeros_like(values)
        else:
            scaled = np.where(missing, 0.0, (values - self.mean) / self.std)
        columns = [scaled, missing] if self.indicator else [scaled]
        return np.stack(columns, axis=1).astype(np.float32)


@dataclass(frozen=True)
class Categorical:
    """How a categorical column is encoded: one column a category, 1 where it holds, else 0.

    Attributes:
        categories: the training values in alphabetical order; "" is the category of missing
            cells. A value that is not among them is encoded as a row of zeros.
    """

    categories: tuple[str, ...]

    def features(self, name: str) -> tuple[str, ...]:
        """The names of the encoded columns."""
        return tuple(f"{name}={c}" if c else f"{name} is missing" for c in self.categories)

    def encode(self, values: Values) -> Floats:
        """Encode strings of shape (N,) as one-hot rows of shape (N, categories)."""
        return np.asarray(values[:, None] == np.array(self.categories), np.float32)


@dataclass(frozen=True)
class Encoder:
    """Turns tables into arrays as `fit_encoder` found it on the training rows.

    Attributes:
        columns: how each column is encoded, by name.
        target_mean: the mean of the training targets.
        target_std: their standard deviation, or 1 where they are all equal.
    """

    columns: Mapping[str, Numeric | Categorical]
    target_mean: float
    target_std: float

    @property
    def features(self) -> tuple[str, ...]:
        """The name of each of the D columns of the inputs."""
        return tuple(f for name, column in self.columns.items() for f in column.features(name))

    def encode(self, table: Table) -> dict[str, Floats]:
        """Arrays for a model: `inputs` of shape (N, D) and `targets` of shape (N, 1), float32.

        The targets have the shape that a model ending in `dense(1)` gives. A number that is
        missing becomes the training mean; a category not seen in training, a row of zeros.

        Raises:
            ValueError: the table's columns, or their kinds, are not those of the training table.
        """
        targets = (table.targets - self.target_mean) / self.target_std
        return {
            "inputs": self.encode_inputs(table.columns),
            "targets": targets[:, None].astype(np.float32),
        }

    def encode_inputs(self, columns: Mapping[str, Values]) -> Floats:
        """The inputs alone, shape (N, D), for rows whose target is not known.

        Args:
            columns: arrays as in `Table.columns`, in any order.
        """
        if set(columns) != set(self.columns):
            raise ValueError(
                f"encode needs the columns of the training table, {list(self.columns)}, "
                f"got {list(columns)}; read both tables with the same columns"
            )
        for name, column in self.columns.items():
            kind = "numeric" if isinstance(column, Numeric) else "categorical"
            if _is_numeric(columns[name]) != (kind == "numeric"):
                raise ValueError(
                    f"column {name!r} was {kind} in training, got an array of dtype "
                    f"{columns[name].dtype}; pass {kind}=({name!r},) to read_table"
                )
        encoded = [column.encode(columns[name]) for name, column in self.columns.items()]
        return np.concatenate(encoded, axis=1)

    def decode_targets(self, scaled: npt.ArrayLike | float) -> npt.NDArray[np.float64]:
        """Targets or predictions, of any shape, back in the target's own unit."""
        return np.asarray(np.asarray(scaled, np.float64) * self.target_std + self.target_mean)


def fit_encoder(train: Table, *, max_categories: int = 256) -> Encoder:
    """Learn from the training rows how to encode a table; test rows must not be among them.

    Numeric columns and the target are standardised by the mean and the standard deviation (of the
    population) of the values present. A column with missing numbers gains an indicator column.
    Categorical columns become one column a category.

    Args:
        train: the training rows.
        max_categories: the most categories that a column may have.

    Returns:
        An `Encoder`, for the training rows and for any others with the same columns.

    Raises:
        ValueError: a column has more than `max_categories` categories, as names, dates and
            identifiers do.

    Example:
        >>> from backhand.data import fit_encoder, houses
        >>> train, test = houses(100, seed=0).split(test_fraction=0.2, seed=0)
        >>> encoder = fit_encoder(train)
        >>> data = encoder.encode(test)
        >>> data["inputs"].shape, data["targets"].shape
        ((20, 4), (20, 1))
        >>> bool(np.allclose(encoder.decode_targets(data["targets"])[:, 0], test.targets))
        True
    """
    columns: dict[str, Numeric | Categorical] = {}
    for name, values in train.columns.items():
        if _is_numeric(values):
            columns[name] = _fit_numeric(values)
            continue
        categories = np.unique(values).tolist()
        if len(categories) > max_categories:
            raise ValueError(
                f"column {name!r} may have at most max_categories={max_categories} categories, "
                f"got {len(categories)}; if it identifies rows, pass ignore=({name!r},) to "
                "read_table, and otherwise raise max_categories"
            )
        columns[name] = Categorical(tuple(categories))
    target = _fit_numeric(train.targets)
    return Encoder(columns, target.mean, target.std or 1.0)


def _is_numeric(values: Values) -> bool:
    """Whether a column holds numbers; the others hold strings."""
    return values.dtype.kind == "f"


def _fit_numeric(values: Values) -> Numeric:
    """Mean and standard deviation of the values present, and whether some are missing."""
    present = values[~np.isnan(values)]
    indicator = len(present) < len(values)
    if len(present) == 0:
        return Numeric(0.0, 0.0, indicator)
    if present.min() == present.max():
        # Rounding in the mean would leave a tiny deviation, which scaling would blow up.
        return Numeric(float(present[0]), 0.0, indicator)
    return Numeric(float(present.mean()), float(present.std()), indicator)
