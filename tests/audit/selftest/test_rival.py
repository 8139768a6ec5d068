"""`check_grads` beside the audit, on the same passes."""

import pytest

import backhand as bh
from backhand import ops
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.rival import Rival, passes
from backhand.audit.selftest.trial import F32, F64, Trial
from backhand.catalogue import ROWS


@pytest.fixture(scope="module")
def linear():
    return Trial(next(row for row in ROWS if row.subject is ops.linear), B=4)


def test_it_passes_a_right_pass_and_fails_a_wrong_one(linear):
    assert passes(linear, F64)
    assert not passes(linear, F64, BUGS["missing mean"], linear.sites[1])


def test_a_coarse_step_passes_a_bias_that_the_audit_finds_wrong(linear):
    assert passes(linear, F32, BUGS["factor 1.001"], linear.sites[2], step=1e-1)


def test_what_comes_out_of_a_wrong_dtype_is_not_seen(linear):
    assert passes(linear, F64, BUGS["wrong dtype"], linear.sites[2])


def test_a_row_adds_its_right_passes_and_some_bugs(linear):
    rival = Rival()
    rival.add(linear, turn=0)
    assert rival.correct == {"float32": 1, "float64": 1}
    assert rival.left_out == 0
    kinds = {kind for _, kind, _ in rival.bugs}
    assert 0 < len(kinds) < len(BUGS) / 2
    other = Rival()
    other.add(linear, turn=1)
    assert not kinds & {kind for _, kind, _ in other.bugs}


def test_it_is_spared_what_is_no_derivative_by_design():
    row = next(row for row in ROWS if row.subject is bh.combinators.freeze)
    rival = Rival()
    rival.add(Trial(row, B=4))
    assert (rival.left_out, rival.bugs) == (1, {})


def test_the_best_step_is_the_one_with_fewest_false_alarms():
    rival = Rival()
    rival.alarms.update({("float32", None): 5, ("float32", 1e-3): 2, ("float32", 1e-2): 2})
    rival.alarms["float32", 1e-1] = 3
    assert rival.best("float32") == 1e-3


def test_two_merge_into_that_of_all(linear):
    one, other = Rival(), Rival()
    one.add(linear, turn=0)
    other.add(linear, turn=0)
    other.left_out, other.alarms["float32", None] = 2, 3
    one.merge(other)
    assert (one.left_out, one.alarms["float32", None]) == (2, 3)
    assert one.correct == {"float32": 2, "float64": 2}
    assert one.bugs == {place: (2 * a, 2 * b) for place, (a, b) in other.bugs.items()}
