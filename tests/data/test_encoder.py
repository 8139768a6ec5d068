"""The encoder: scaled by the training rows alone, finite, and undone exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from backhand.data import Batches, Table, fit_encoder, houses

numbers = st.floats(-1e9, 1e9, allow_subnormal=False)


def table(columns, targets=None):
    columns = {name: np.array(values) for name, values in columns.items()}
    rows = len(next(iter(columns.values())))
    return Table(columns, "y", np.arange(rows, dtype=float) if targets is None else targets)


def inputs(train, test):
    return fit_encoder(train).encode(test)["inputs"]


def test_training_columns_and_targets_have_mean_zero_and_deviation_one():
    made = houses(2000, seed=0)
    data = fit_encoder(made).encode(made)
    assert data["inputs"].dtype == data["targets"].dtype == np.float32
    assert data["inputs"].shape == (2000, 4)
    assert data["targets"].shape == (2000, 1)
    for array in data.values():
        np.testing.assert_allclose(array.mean(axis=0, dtype=np.float64), 0, atol=1e-6)
        np.testing.assert_allclose(array.std(axis=0, dtype=np.float64), 1, atol=1e-6)


def test_test_rows_are_scaled_by_the_training_rows():
    train = table({"x": [0.0, 2.0]}, np.array([10.0, 30.0]))
    data = fit_encoder(train).encode(table({"x": [5.0]}, np.array([40.0])))
    assert data["inputs"].tolist() == [[4]]
    assert data["targets"].tolist() == [[2]]


def test_nothing_of_the_test_rows_leaks_into_the_encoding_of_the_training_rows():
    train, test = houses(50, seed=0).split(test_fraction=0.2, seed=0)
    encoder = fit_encoder(train)
    before = encoder.encode(train)
    wild = {name: 1e6 * values for name, values in test.columns.items()}
    encoder.encode(Table(wild, test.target, 1e6 * test.targets))
    after = encoder.encode(train)
    assert encoder == fit_encoder(train)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@settings(max_examples=50, deadline=None)
@given(
    x=hnp.arrays(float, 8, elements=st.one_of(numbers, st.just(np.nan))),
    y=hnp.arrays(float, 8, elements=numbers),
)
def test_any_training_table_is_encoded_as_finite_numbers_and_its_targets_come_back(x, y):
    train = table({"x": x}, y)
    encoder = fit_encoder(train)
    data = encoder.encode(train)
    assert np.isfinite(data["inputs"]).all()
    assert abs(data["inputs"]).max() <= np.sqrt(8) * (1 + 1e-6)
    back = encoder.decode_targets(data["targets"])[:, 0]
    np.testing.assert_allclose(back, y, rtol=1e-6, atol=1e-6 * abs(y).max())


@pytest.mark.parametrize("value", [0.1, -7.3e8, 0.0])
def test_a_constant_column_is_zero_in_training_and_after(value):
    train = table({"x": [value] * 7})
    assert not inputs(train, train).any()
    assert not inputs(train, table({"x": [value + 1]})).any()


def test_a_constant_target_is_zero_and_keeps_its_unit():
    encoder = fit_encoder(table({"x": [1.0, 2.0]}, np.array([0.1, 0.1])))
    data = encoder.encode(table({"x": [1.0, 2.0]}, np.array([0.1, 2.1])))
    assert data["targets"].tolist() == [[0], [2]]
    np.testing.assert_allclose(encoder.decode_targets(data["targets"]), [[0.1], [2.1]], rtol=1e-7)


def test_missing_numbers_become_the_training_mean_and_are_marked():
    train = table({"x": [0.0, 2.0, np.nan], "z": [1.0, 3.0, 1.0]})
    encoder = fit_encoder(train)
    assert encoder.features == ("x", "x is missing", "z")
    assert encoder.encode(train)["inputs"][:, :2].tolist() == [[-1, 0], [1, 0], [0, 1]]


def test_a_number_missing_for_the_first_time_at_test_becomes_the_training_mean():
    assert inputs(table({"x": [0.0, 2.0]}), table({"x": [np.nan]})).tolist() == [[0]]


def test_a_column_without_a_number_in_training_is_zero():
    train = table({"x": [np.nan, np.nan]})
    assert inputs(train, train).tolist() == [[0, 1], [0, 1]]
    assert inputs(train, table({"x": [5.0]})).tolist() == [[0, 0]]


def test_categories_become_one_column_each_and_missing_is_one_of_them():
    train = table({"zone": ["south", "north", ""]})
    encoder = fit_encoder(train)
    assert encoder.features == ("zone is missing", "zone=north", "zone=south")
    assert encoder.encode(train)["inputs"].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_a_category_not_seen_in_training_is_a_row_of_zeros():
    train = table({"zone": ["south", "north"]})
    unseen = table({"zone": ["southern", "", "north"]})
    assert inputs(train, unseen).tolist() == [[0, 0], [0, 0], [1, 0]]


def test_rows_without_a_target_are_encoded_alike_in_any_order_of_columns():
    made = houses(20, seed=0)
    encoder = fit_encoder(made)
    shuffled = dict(reversed(made.columns.items()))
    np.testing.assert_array_equal(encoder.encode_inputs(shuffled), encoder.encode(made)["inputs"])


def test_predictions_of_any_shape_are_given_in_the_unit_of_the_target():
    encoder = fit_encoder(table({"x": [0.0, 1.0]}, np.array([100.0, 300.0])))
    assert encoder.decode_targets(0.5) == 250
    assert encoder.decode_targets(np.float32([[-1], [1]])).tolist() == [[100], [300]]


def test_encoded_arrays_feed_batches():
    made = houses(20, seed=0)
    batch = Batches(fit_encoder(made).encode(made), 8, seed=0)[0]
    assert batch["inputs"].shape == (8, 4)
    assert batch["targets"].shape == (8, 1)


def test_columns_other_than_those_of_training_are_refused():
    encoder = fit_encoder(table({"a": [0.0, 1.0], "b": [0.0, 1.0]}))
    for columns in ({"a": [0.0]}, {"a": [0.0], "b": [0.0], "c": [0.0]}):
        with pytest.raises(ValueError, match=r"needs the columns .*\['a', 'b'\], got"):
            encoder.encode(table(columns))


@pytest.mark.parametrize(
    ("train", "test", "kind"),
    [([0.0, 1.0], ["a"], "numeric"), (["a", "b"], [0.0], "categorical")],
)
def test_a_column_of_another_kind_than_in_training_is_refused(train, test, kind):
    encoder = fit_encoder(table({"x": train}))
    with pytest.raises(ValueError, match=rf"'x' was {kind} in training.*pass {kind}=\('x',\)"):
        encoder.encode(table({"x": test}))


def test_a_column_of_names_is_refused_instead_of_becoming_thousands_of_columns():
    names = table({"name": [f"house {i}" for i in range(300)]})
    with pytest.raises(ValueError, match=r"max_categories=256 categories, got 300.*ignore="):
        fit_encoder(names)
    assert len(fit_encoder(names, max_categories=300).features) == 300
