"""Tables: what they hold, what they refuse, and how they are cut."""

import numpy as np
import pytest

from backhand.data import Table


def table(rows=10):
    area = np.arange(rows, dtype=float)
    zone = np.array(["north", "south"] * rows)[:rows]
    return Table({"area": area, "zone": zone}, "price", 10 * area, dropped=2)


def test_a_table_knows_its_length_and_prints_what_it_holds():
    assert len(table()) == 10
    assert str(table()).splitlines() == [
        "10 rows, target price",
        "numeric: area",
        "categorical: zone",
        "rows dropped for want of a target: 2",
    ]
    assert "categorical: none" in str(Table({"a": np.zeros(1)}, "y", np.zeros(1)))


def test_taken_rows_come_in_the_order_asked_for_with_their_targets():
    taken = table().take(np.array([3, 1]))
    assert taken.columns["area"].tolist() == [3, 1]
    assert taken.columns["zone"].tolist() == ["south", "south"]
    assert taken.targets.tolist() == [30, 10]
    assert (taken.target, taken.dropped) == ("price", 2)


def test_a_split_puts_every_row_in_exactly_one_part():
    train, test = table().split(test_fraction=0.3, seed=0)
    assert (len(train), len(test)) == (7, 3)
    assert sorted([*train.targets, *test.targets]) == table().targets.tolist()
    again, _ = table().split(test_fraction=0.3, seed=0)
    np.testing.assert_array_equal(train.targets, again.targets)


@pytest.mark.parametrize(
    ("columns", "targets", "message"),
    [
        ({}, np.zeros(2), "at least one column"),
        ({"a": np.zeros(0)}, np.zeros(0), "at least one row"),
        ({"a": np.zeros(3)}, np.zeros(2), r"column 'a' must hold .* shape \(2,\), got .*\(3,\)"),
        ({"a": np.zeros((2, 1))}, np.zeros(2), "column 'a' must hold"),
        ({"a": np.zeros(2, int)}, np.zeros(2), "floats or strings.*int64"),
        ({"a": np.array([0, np.inf])}, np.zeros(2), "column 'a' must be finite"),
        ({"a": np.zeros(2)}, np.array([0, np.nan]), "'y' must be one finite number a row"),
        ({"a": np.zeros(2)}, np.zeros((2, 1)), "'y' must be one finite number a row"),
    ],
)
def test_arrays_that_are_no_table_are_refused(columns, targets, message):
    with pytest.raises(ValueError, match=message):
        Table(columns, "y", targets)
