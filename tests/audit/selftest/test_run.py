"""The self-test as a function: its sizes, right passes that fail, and rows in several processes."""

import dataclasses

import pytest

from backhand import ops
from backhand.audit.selftest import run
from backhand.audit.selftest.run import selftest, sizes_of
from backhand.catalogue import ROWS


def test_a_row_is_audited_at_an_even_and_an_odd_size_and_at_its_borders():
    row = next(row for row in ROWS if row.subject is ops.linear)
    even, odd, *borders = sizes_of(row)
    assert set(even.values()) == {16, 4}
    assert set(odd.values()) == {5, 7}
    assert borders == [dict(edge) for edge in row.edges]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_every_row_takes_the_sizes_that_it_is_audited_at(row):
    for sizes in sizes_of(row):
        assert run._runs(row, sizes)


def test_a_verdict_that_fails_right_passes_is_noticed(monkeypatch):
    monkeypatch.setattr("backhand.audit.selftest.run.correct", lambda trial, dtype, seed: False)
    row = next(row for row in ROWS if row.subject is ops.tanh)
    tally, _ = selftest([row], quick=True)
    assert any("right passes fail" in failure for failure in tally.failures)


@pytest.mark.oldest_only
def test_several_processes_count_what_one_does():
    rows = [row for row in ROWS if row.subject in (ops.tanh, ops.relu)]
    (one, _), (two, _) = selftest(rows, quick=True), selftest(rows, quick=True, processes=2)
    assert one.to_dict() == two.to_dict()


def test_rows_of_ones_own_are_taken_in_one_process():
    own = dataclasses.replace(next(row for row in ROWS if row.subject is ops.tanh), name="mine")
    with pytest.raises(ValueError, match=r"rows of the catalogue alone, got mine\(\)"):
        selftest([own], processes=2)
