"""Exercises on tables and time: each answer is right, and typical mistakes are told apart."""

import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.audit.exercises.sequences import TASKS
from tests.audit.exercises.common import check_answer, every


@every(TASKS)
def test_the_answer_is_right_and_none_zeros_and_a_sign_are_not(name):
    check_answer(name)


def attended(residuals, dy, root=1):
    q, k, v, p = residuals
    dp = dy @ v.T
    dscores = p * (dp - (p * dp).sum(1, keepdims=True)) / q.shape[1] ** (root / 2)
    return dscores @ k, dscores.T @ q, p.T @ dy


def without_time(residuals, dy):
    """Each step for itself."""
    x, w, u, h, y = residuals
    da = dy * (1 - y**2)
    before = jnp.concatenate([h[None], y[:-1]])
    return da @ w.T, x.T @ da, before.T @ da, da[0] @ u.T


MISTAKES = {
    "the last use alone": (
        "embedding",
        lambda r, dy: (jnp.zeros_like(r[0]).at[r[1]].set(dy), None),
        ["dtable"],
    ),
    "the root": ("attention", lambda r, dy: attended(r, dy, root=0), ["dq", "dk"]),
    "no blame from later": ("recurrent", without_time, ["dx", "dw", "du", "dh"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_is_found_where_it_is(mistake):
    name, attempt, wrong = MISTAKES[mistake]
    verdict = bh.audit.exercise(name).check(attempt)
    assert not verdict
    assert list(verdict.causes) == wrong
    assert verdict.hint.startswith(f"{wrong[0]}: ")


def test_the_root_is_named_as_a_factor():
    verdict = bh.audit.exercise("attention").check(lambda r, dy: attended(r, dy, root=0))
    assert verdict.message.startswith("dq: 2")
