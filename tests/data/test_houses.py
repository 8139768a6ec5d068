"""Made houses: the stated formula, the stated noise, plausible values."""

import numpy as np
import pytest

from backhand.data import Table, houses


def test_without_noise_the_price_is_the_stated_formula():
    table = houses(500, seed=0, noise=0.0)
    area, bedrooms, age, distance = (
        table.columns[name] for name in ("square_metres", "bedrooms", "age_years", "distance_km")
    )
    land = 3500 * area * np.exp(-distance / 25) * (1 - 0.004 * age)
    np.testing.assert_allclose(table.targets, 80_000 + land + 12_000 * bedrooms, rtol=1e-12)


def test_the_noise_is_gaussian_with_the_stated_deviation():
    exact = houses(20_000, seed=1, noise=0.0)
    noisy = houses(20_000, seed=1, noise=15_000.0)
    error = noisy.targets - exact.targets
    # Of 20,000 draws: the deviation is known to 0.5 %, the mean to 106.
    assert error.std() == pytest.approx(15_000, rel=0.025)
    assert abs(error.mean()) < 5 * 106
    assert (abs(error) < 15_000).mean() == pytest.approx(0.683, abs=0.02)


def test_the_houses_follow_from_the_seed_and_not_from_the_noise():
    first, again, other = houses(50, seed=2), houses(50, seed=2, noise=1), houses(50, seed=3)
    for name, values in first.columns.items():
        np.testing.assert_array_equal(values, again.columns[name])
        assert not np.array_equal(values, other.columns[name])
    np.testing.assert_array_equal(first.targets, houses(50, seed=2).targets)


def test_values_are_plausible():
    table = houses(20_000, seed=0, noise=0.0)
    ranges = {name: (values.min(), values.max()) for name, values in table.columns.items()}
    assert ranges["bedrooms"] == (1, 6)
    for name, low, high in [
        ("square_metres", 40, 180),
        ("age_years", 0, 80),
        ("distance_km", 0, 30),
    ]:
        assert low <= ranges[name][0] < ranges[name][1] <= high
    assert 120_000 < table.targets.min() < table.targets.max() < 782_000


def test_a_straight_line_does_not_explain_the_price():
    table = houses(5000, seed=0, noise=0.0)
    features = np.stack([*table.columns.values(), np.ones(5000)], axis=1)
    fitted, *_ = np.linalg.lstsq(features, table.targets)
    error = np.sqrt(np.mean((features @ fitted - table.targets) ** 2))
    assert 10_000 < error < 0.3 * table.targets.std()


def test_it_is_a_table_like_one_read_from_a_file():
    table = houses(10, seed=0)
    assert isinstance(table, Table)
    assert (len(table), table.target, table.dropped) == (10, "price", 0)


@pytest.mark.parametrize("examples", [0, -1])
def test_no_houses_are_refused(examples):
    with pytest.raises(ValueError, match=f"examples must be >= 1, got {examples}"):
        houses(examples, seed=0)


@pytest.mark.parametrize("noise", [-1.0, float("inf"), float("nan")])
def test_noise_that_is_no_deviation_is_refused(noise):
    with pytest.raises(ValueError, match="noise must be a finite number of euros >= 0"):
        houses(10, seed=0, noise=noise)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be an integer >= 0"):
        houses(10, seed=-1)
