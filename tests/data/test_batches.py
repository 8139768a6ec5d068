"""Batches: the same for the same step, full, and every example once an epoch."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhand.data import Batches

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**40)


def stream(batches, steps):
    return np.concatenate([batches[step]["x"] for step in range(steps)])


@settings(max_examples=50, deadline=None)
@given(examples=sizes, batch_size=sizes, seed=seeds)
def test_every_batch_is_full_and_every_example_is_seen_once_an_epoch(examples, batch_size, seed):
    batches = Batches({"x": np.arange(examples)}, batch_size, seed=seed)
    seen = stream(batches, examples)
    assert len(seen) == examples * batch_size
    for epoch in np.split(seen, batch_size):
        assert sorted(epoch) == list(range(examples))


@settings(max_examples=50, deadline=None)
@given(
    examples=sizes,
    batch_size=sizes,
    seed=seeds,
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=20),
)
def test_a_batch_depends_on_the_step_and_the_seed_and_not_on_what_was_asked_before(
    examples, batch_size, seed, steps
):
    data = {"x": np.arange(examples)}
    batches = Batches(data, batch_size, seed=seed)
    for step in steps:
        fresh = Batches(data, batch_size, seed=seed)
        np.testing.assert_array_equal(batches[step]["x"], fresh[step]["x"])


@settings(max_examples=30, deadline=None)
@given(examples=sizes, batch_size=sizes, seed=seeds)
def test_the_stream_of_examples_is_the_same_for_any_batch_size(examples, batch_size, seed):
    data = {"x": np.arange(examples)}
    batched = stream(Batches(data, batch_size, seed=seed), 10)
    single = stream(Batches(data, 1, seed=seed), 10 * batch_size)
    np.testing.assert_array_equal(batched, single)


def test_the_order_is_pinned_so_that_a_run_resumes_under_any_release_of_numpy():
    batches = Batches({"x": np.arange(8)}, 8, seed=0)
    assert batches[0]["x"].tolist() == [4, 7, 2, 6, 0, 5, 1, 3]
    assert batches[1]["x"].tolist() == [4, 6, 1, 7, 2, 3, 0, 5]


def test_epochs_and_seeds_are_shuffled_differently():
    data = {"x": np.arange(100)}
    orders = [Batches(data, 100, seed=seed)[step]["x"] for seed in range(5) for step in range(5)]
    assert len({tuple(order) for order in orders}) == 25


def test_every_position_of_an_epoch_is_equally_likely_for_an_example():
    batches = Batches({"x": np.arange(4)}, 4, seed=0)
    epochs = np.stack([batches[step]["x"] for step in range(4000)])
    counts = np.stack([(epochs == example).sum(axis=0) for example in range(4)])
    # 4,000 draws with probability 1/4 have a standard deviation of 27.
    assert abs(counts - 1000).max() < 5 * 27


def test_the_arrays_of_a_batch_stay_aligned_and_keep_shape_and_dtype():
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    y = np.arange(10, dtype=np.int32)
    batches = Batches({"inputs": x, "targets": y}, 4, seed=3)
    for step in range(5):
        batch = batches[step]
        assert list(batch) == ["inputs", "targets"]
        assert batch["inputs"].shape == (4, 3)
        assert batch["inputs"].dtype == np.float32
        assert batch["targets"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"], x[batch["targets"]])
        np.testing.assert_array_equal(batch["targets"], y[batches.rows(step)])


def test_changing_a_batch_does_not_change_the_data():
    batches = Batches({"x": np.arange(6)}, 6, seed=0)
    before = batches[0]["x"].copy()
    batches[0]["x"][:] = -1
    batches.rows(0)[:] = 0
    np.testing.assert_array_equal(batches[0]["x"], before)


def test_a_step_far_into_a_run_and_a_step_given_by_numpy_are_as_good_as_any():
    batches = Batches({"x": np.arange(7)}, 3, seed=0)
    assert batches[10**12]["x"].shape == (3,)
    np.testing.assert_array_equal(batches[np.int64(5)]["x"], batches[5]["x"])


def test_batches_survive_pickling_as_worker_processes_need():
    batches = Batches({"x": np.arange(7)}, 3, seed=0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(batches))[4]["x"], batches[4]["x"])


def test_only_the_orders_of_the_last_two_epochs_are_kept():
    batches = Batches({"x": np.arange(5)}, 2, seed=0)
    for step in range(50):
        batches[step]
        assert len(batches._orders) <= 2


def test_steps_per_epoch_is_not_rounded():
    batches = Batches({"x": np.arange(5)}, 2, seed=0)
    assert batches.steps_per_epoch == 2.5
    assert batches.examples == 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "at least one array, got an empty dict"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, r"one leading length, got \{'x': 3, 'y': 4\}"),
        ({"x": np.zeros(3), "y": np.float32(1)}, r"leading axis of examples.*\['y'\]"),
        ({"x": np.zeros((0, 2))}, "at least one example"),
    ],
)
def test_arrays_without_a_common_leading_length_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        Batches(arrays, 1, seed=0)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be >= 1, got {batch_size}"):
        Batches({"x": np.zeros(3)}, batch_size, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        Batches({"x": np.zeros(3)}, 1, seed=-1)


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="step must be >= 0, got -1"):
        Batches({"x": np.zeros(3)}, 1, seed=0)[-1]


@pytest.mark.parametrize("step", [1.0, "1", None, True, slice(0, 2)])
def test_a_step_that_is_not_an_integer_is_refused(step):
    with pytest.raises(TypeError, match="step"):
        Batches({"x": np.zeros(3)}, 1, seed=0)[step]
