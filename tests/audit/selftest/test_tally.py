"""Counts of a self-test, and the targets that it must meet."""

import json

import pytest

from backhand.audit.result import Cause
from backhand.audit.selftest.outcome import Outcome
from backhand.audit.selftest.tally import Tally

W = frozenset({"w"})
NAMED = Outcome(W, W, Cause("sign", "the sign is flipped"))
UNNAMED = Outcome(W, W, Cause("unknown", "no simple relation"))
ELSEWHERE = Outcome(W, frozenset({"w", "b"}), Cause("sign", "the sign is flipped"))
MISSED = Outcome(W, frozenset(), None)
NO_BUG = Outcome(frozenset(), frozenset(), None)


def tally_of(*outcomes, right=(True,)):
    """Counts in float32."""
    tally = Tally()
    for outcome in outcomes:
        tally.bug("float32", "sign", "ops.tanh()", outcome, frozenset({"sign"}))
    for passes in right:
        tally.right("float32", "ops.tanh()", passes)
    return tally


def test_each_outcome_counts_for_what_it_names():
    counts = tally_of(NAMED, UNNAMED, ELSEWHERE, MISSED, NO_BUG, right=(True, True, False))
    assert counts.totals("float32") == {
        "planted": 4,
        "caught": 3,
        "leaf_named": 2,
        "cause_named": 2,
        "correct": 3,
        "false_alarms": 1,
    }


def test_what_was_missed_is_remembered():
    tally = tally_of(NAMED, UNNAMED, MISSED)
    assert len(tally.missed) == len(tally.unnamed) == 1
    assert "sign in ops.tanh()" in tally.missed[0]


def test_a_right_row_that_fails_the_whole_audit_is_a_false_alarm():
    tally = tally_of(NAMED)
    tally.audit("ops.tanh()", [])
    tally.audit("ops.gelu()", ["vmap it is off by 1.0"])
    assert tally.to_dict()["bh.check"]["false_alarms"] == 1
    assert tally.failures == ["bh.check: 1 of 2 right rows fail"]


def test_the_targets_are_met_by_a_perfect_audit():
    assert tally_of(*[NAMED] * 100).failures == []


@pytest.mark.parametrize(
    ("outcomes", "right", "text"),
    [
        ([NAMED] * 98 + [MISSED] * 2, [True], "98 of 100 bugs are caught, fewer than 99%"),
        ([NAMED] * 79 + [UNNAMED] * 21, [True], "79 of 100 causes are named, fewer than 80%"),
        ([NAMED] * 99 + [ELSEWHERE], [True], "1 name another leaf"),
        ([NAMED], [True, False], "1 of 2 right passes fail"),
    ],
)
def test_a_missed_target_is_a_sentence(outcomes, right, text):
    (failure,) = tally_of(*outcomes, right=right).failures
    assert text in failure


def test_nothing_planted_is_no_success():
    assert Tally().failures == ["nothing was planted, so nothing is shown"]


def test_the_counts_by_dtype_and_kind_are_ready_for_json():
    values = json.loads(json.dumps(tally_of(NAMED, MISSED).to_dict()))
    assert values["float32"]["planted"] == 2
    assert values["kinds"] == [
        {
            "kind": "sign",
            "dtype": "float32",
            "planted": 2,
            "caught": 1,
            "leaf_named": 1,
            "cause_named": 1,
            "causes": {"sign": 1},
        }
    ]


def test_two_tallies_merge_into_that_of_all():
    both, more = tally_of(NAMED, MISSED, right=[True]), tally_of(UNNAMED, right=[False])
    more.audit("ops.tanh()", ["taylor wrong"])
    both.merge(more)
    every = tally_of(NAMED, MISSED, UNNAMED, right=[True, False])
    every.audit("ops.tanh()", ["taylor wrong"])
    assert both.to_dict() == every.to_dict()
    assert (both.missed, both.unnamed) == (every.missed, every.unnamed)
