"""Exercises on losses: each answer is right, and typical mistakes are told apart."""

import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.audit.exercises.losses import TASKS
from tests.audit.exercises.common import check_answer, every


@every(TASKS)
def test_the_answer_is_right_and_none_zeros_and_a_sign_are_not(name):
    check_answer(name)


def truth(p, labels):
    return (labels[:, None] == jnp.arange(p.shape[1])).astype(p.dtype)


MISTAKES = {
    "the mean over rows": (
        "mean_squared_error",
        lambda e, dy: (2 * e * dy / len(e), -2 * e * dy / len(e)),
        "What does it divide by",
    ),
    "both the same": (
        "mean_squared_error",
        lambda e, dy: (2 * e * dy / e.size, 2 * e * dy / e.size),
        "dtargets: when this argument rises",
    ),
    "only the diagonal": ("softmax", lambda y, dy: y * (1 - y) * dy, ""),
    "the mean over examples": (
        "softmax_cross_entropy",
        lambda r, dy: ((r[0] - truth(*r)) * dy, None),
        "What does it divide by",
    ),
    "dy ignored": (
        "softmax_cross_entropy",
        lambda r, dy: ((r[0] - truth(*r)) / len(r[1]), None),
        "Where do you use dy?",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_gets_its_hint(mistake):
    name, attempt, hint = MISTAKES[mistake]
    verdict = bh.audit.exercise(name).check(attempt)
    assert not verdict
    assert hint in verdict.hint, str(verdict)
