"""Hints follow from the cause."""

import re

import pytest

from backhand.audit.diagnosis import KINDS
from backhand.audit.exercises.advice import ADVICE, OTHERWISE, advice, of_shape
from backhand.audit.result import Cause


def test_every_kind_of_advice_is_one_of_a_cause():
    assert ADVICE.keys() <= KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_cause_has_advice_without_code(kind):
    text = advice(Cause(kind, ""))
    assert text
    assert not re.search(r"[=@*]|jnp|np\.", text)


def test_an_unknown_cause_has_advice_too():
    assert advice(Cause("unknown", "")) == OTHERWISE


@pytest.mark.parametrize(
    ("got", "needed", "said"),
    [
        ((3, 5), (5, 3), "in another order"),
        ((4, 5), (5,), "added up"),
        ((4, 5), (1, 5), "added up"),
        ((5,), (), "added up"),
        ((), (5,), "needs its own"),
        ((5,), (4, 5), "needs its own"),
    ],
)
def test_a_shape_tells_what_was_forgotten(got, needed, said):
    assert said in of_shape("b", got, needed)
