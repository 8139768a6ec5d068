"""A made table of houses whose price follows a known formula."""

import math
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from backhand.data.batches import check_seed
from backhand.data.table import Table

Column = npt.NDArray[np.float64]


def house_price(
    square_metres: Column, bedrooms: Column, age_years: Column, distance_km: Column
) -> Column:
    """The formula of `houses`, in euros, before noise."""
    land = 3_500 * square_metres * np.exp(-distance_km / 25)
    return 80_000 + land * (1 - 0.004 * age_years) + 12_000 * bedrooms


def houses(examples: int, *, seed: SupportsIndex, noise: float | int = 20_000) -> Table:
    """Made houses, and their prices in euros by a stated formula.

        price = 80,000 + 3,500 area exp(-distance / 25) (1 - 0.004 age) + 12,000 bedrooms + error

    with area uniform in [40, 180] square metres, bedrooms area / 30 plus a standard deviation of
    0.7, rounded and held to [1, 6], age uniform in [0, 80] years, distance to the centre
    exponential with mean 6 and at most 30 km, and error Gaussian with standard deviation `noise`.
    Before the error, every price lies between 120,000 and 782,000. A linear model can't fit the
    products of area, distance and age; no model can expect a root mean square error under `noise`.

    Args:
        examples: how many houses, >= 1.
        seed: an integer >= 0. The houses follow from it alone, whatever the noise.
        noise: standard deviation of the error in euros, >= 0.

    Returns:
        A `Table` of the columns `square_metres`, `bedrooms`, `age_years` and `distance_km`, with
        the target `price`: what `read_table` returns for a file.

    Raises:
        ValueError: `examples` < 1, `seed` < 0, or `noise` is negative or not finite.

    Example:
        >>> from backhand.data import houses
        >>> table = houses(1000, seed=0)
        >>> len(table), list(table.columns)
        (1000, ['square_metres', 'bedrooms', 'age_years', 'distance_km'])
    """
    if examples < 1:
        raise ValueError(f"examples must be >= 1, got {examples}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite number of euros >= 0, got {noise}")
    draw = np.random.default_rng(check_seed(seed))
    area = draw.uniform(40, 180, examples)
    columns = {
        "square_metres": area,
        "bedrooms": np.clip(np.round(area / 30 + draw.normal(0, 0.7, examples)), 1, 6),
        "age_years": draw.uniform(0, 80, examples),
        "distance_km": np.minimum(draw.exponential(6, examples), 30),
    }
    price = house_price(**columns) + draw.normal(0, noise, examples)
    return Table(columns=columns, target="price", targets=price)
