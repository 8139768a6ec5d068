"""The split: a partition, from the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhand.data import Batches, houses, train_test_split


@settings(max_examples=50, deadline=None)
@given(examples=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_every_example_is_in_exactly_one_part(examples, share, seed):
    data = {"x": np.arange(examples), "y": 10 * np.arange(examples)}
    size = round(examples * share)
    if size in (0, examples):
        with pytest.raises(ValueError, match="both parts need at least one example"):
            train_test_split(data, test_fraction=share, seed=seed)
        return
    train, test = train_test_split(data, test_fraction=share, seed=seed)
    assert len(test["x"]) == size
    assert sorted([*train["x"], *test["x"]]) == list(range(examples))
    for part in (train, test):
        np.testing.assert_array_equal(part["y"], 10 * part["x"])


def test_the_split_follows_from_the_seed():
    data = {"x": np.arange(100)}
    tests = [train_test_split(data, test_fraction=0.2, seed=s)[1]["x"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(tests[0], tests[1])
    assert not np.array_equal(tests[0], tests[2])


def test_rows_keep_their_order():
    train, test = train_test_split({"x": np.arange(50)}, test_fraction=0.4, seed=0)
    assert (np.diff(train["x"]) > 0).all()
    assert (np.diff(test["x"]) > 0).all()


def test_the_split_and_the_batches_of_one_seed_do_not_share_an_order():
    data = {"x": np.arange(100)}
    _, test = train_test_split(data, test_fraction=0.2, seed=7)
    assert set(Batches(data, 20, seed=7)[0]["x"]) != set(test["x"])


def test_data_drawn_with_the_seed_of_the_split_is_split_at_random():
    data = {"x": np.random.default_rng(0).uniform(size=2000)}
    train, test = train_test_split(data, test_fraction=0.5, seed=0)
    assert abs(train["x"].mean() - test["x"].mean()) < 0.05


def test_houses_are_split_at_random_whatever_the_seed():
    for seed in range(5):
        train, test = houses(2000, seed=seed).split(test_fraction=0.5, seed=seed)
        assert abs(train.targets.mean() / test.targets.mean() - 1) < 0.05


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_a_fraction_outside_zero_and_one_is_refused(share):
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1"):
        train_test_split({"x": np.arange(10)}, test_fraction=share, seed=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [({}, "empty dict"), ({"x": np.zeros(3), "y": np.zeros(4)}, "one leading length")],
)
def test_arrays_without_a_common_leading_length_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        train_test_split(arrays, test_fraction=0.5, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be an integer >= 0"):
        train_test_split({"x": np.arange(10)}, test_fraction=0.5, seed=-1)
