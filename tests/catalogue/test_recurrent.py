"""Rows of the recurrent family: every op with a state, with lengths, and from either end."""

import pytest

from backhand.catalogue import recurrent


@pytest.mark.parametrize("name", ["ops.lstm", "ops.gru", "ops.elman"])
def test_every_op_has_rows_with_and_without_state_and_lengths(name):
    rows = [row for row in recurrent.ROWS if row.name == name]
    optional = {(row.inputs[-2] is None, row.inputs[-1] is None) for row in rows}
    assert optional == {(True, True), (False, False)}
    assert {row.settings.get("reverse", False) for row in rows} == {False, True}


def test_lengths_reach_from_none_to_all_steps():
    drawn = {
        int(n)
        for row in recurrent.ROWS[1:2]
        for seed in range(20)
        for n in row.arguments(seed=seed)[-1]
    }
    assert drawn == {0, 1, 2, 3}
