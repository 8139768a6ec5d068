"""Exercises with parameters: each answer is right, and typical mistakes are told apart."""

import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.audit.exercises.layers import TASKS
from tests.audit.exercises.common import check_answer, every


@every(TASKS)
def test_the_answer_is_right_and_none_zeros_and_a_sign_are_not(name):
    check_answer(name)


def normalized(residuals, dy, *, mean=True, along=True, divided=True):
    """Layer norm's answer without one of its terms."""
    h, std, scale = residuals
    g = dy * scale
    dx = g - mean * g.mean(1, keepdims=True) - along * h * (g * h).mean(1, keepdims=True)
    return dx / std if divided else dx, (dy * h).sum(0), dy.sum(0)


MISTAKES = {
    "not summed": ("bias", lambda r, dy: (dy, dy), "more than once"),
    "w on the wrong side": (
        "linear",
        lambda r, dy: (dy @ r[1].T, (dy.T @ r[0]), dy.sum(0)),
        "in another order",
    ),
    "everyone is to blame": (
        "max_pool",
        lambda x, dy: jnp.repeat(jnp.repeat(dy, 2, 1), 2, 2),
        "there is no blame",
    ),
    "the path through the mean": (
        "layer_norm",
        lambda r, dy: normalized(r, dy, mean=False),
        "more than one path",
    ),
    "only the direct path": (
        "layer_norm",
        lambda r, dy: normalized(r, dy, mean=False, along=False),
        "more than one path",
    ),
    "the division": ("layer_norm", lambda r, dy: normalized(r, dy, divided=False), "row to row"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_gets_its_hint(mistake):
    name, attempt, hint = MISTAKES[mistake]
    verdict = bh.audit.exercise(name).check(attempt)
    assert not verdict
    assert hint in verdict.hint, str(verdict)


def test_the_path_through_the_standard_deviation_is_missed():
    verdict = bh.audit.exercise("layer_norm").check(lambda r, dy: normalized(r, dy, along=False))
    assert list(verdict.causes) == ["dx"]
    assert "right: dscale and doffset" in verdict.message
