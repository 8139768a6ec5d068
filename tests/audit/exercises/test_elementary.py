"""The first exercises: each answer is right, and typical mistakes are told apart."""

import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.audit.exercises.elementary import TASKS
from tests.audit.exercises.common import check_answer, every


@every(TASKS)
def test_the_answer_is_right_and_none_zeros_and_a_sign_are_not(name):
    check_answer(name)


MISTAKES = {
    "a not summed": ("scale", lambda r, dy: (r[1] * dy, r[0] * dy), "added up"),
    "one use of two": ("square", lambda x, dy: x * dy, "a power"),
    "a sum that is a mean": (
        "sum",
        lambda x, dy: jnp.broadcast_to(dy[:, None], x.shape) / x.shape[1],
        "What does it divide by",
    ),
    "a mean that is a sum": (
        "mean",
        lambda x, dy: jnp.full_like(x, dy),
        "What does it divide by",
    ),
    "y taken for x": (
        "sigmoid",
        lambda y, dy: dy * (1 / (1 + jnp.exp(-y))) * (1 - 1 / (1 + jnp.exp(-y))),
        "shape of the derivative",
    ),
    "no mask": ("relu", lambda x, dy: dy, "there is no blame"),
    "x for its sign": ("relu", lambda x, dy: jnp.maximum(x, 0) * dy, "derivative"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_gets_its_hint(mistake):
    name, attempt, hint = MISTAKES[mistake]
    verdict = bh.audit.exercise(name).check(attempt)
    assert not verdict
    assert hint in verdict.hint, str(verdict)
