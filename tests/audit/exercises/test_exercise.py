"""An exercise: what it shows, what it says of each attempt, and that it keeps the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.audit.exercises.exercise import Exercise


@pytest.fixture
def linear():
    return bh.audit.exercise("linear")


def right(residuals, dy):
    x, w = residuals
    return dy @ w.T, x.T @ dy, dy.sum(0)


def test_it_shows_the_forward_the_question_and_an_empty_backward(linear):
    text = str(linear)
    assert text.startswith("linear (difficulty 2)\n")
    assert "return x @ w + b[None, :], (x, w)" in text
    assert "def backward(residuals, dy):\n        ...\n        return dx, dw, db" in text
    assert "dy @ w.T" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "```python\ndef linear_forward" in linear._repr_markdown_()
    assert repr(linear) == "linear (difficulty 2)"


def test_integers_have_none_in_the_empty_backward():
    assert "return dtable, None" in str(bh.audit.exercise("embedding"))


def test_a_right_attempt_is_true_in_jax_and_in_numpy(linear):
    assert linear.check(right)
    assert linear.check(jax.jit(right))
    verdict = linear.check(
        lambda residuals, dy: right(jax.tree.map(np.asarray, residuals), np.asarray(dy))
    )
    assert verdict
    assert str(verdict) == "Right: dx, dw and db."
    assert linear.check(lambda residuals, dy: list(right(residuals, dy)))


def test_it_is_judged_in_float64_whatever_the_session_has_set(linear):
    def slightly_off(residuals, dy):
        dx, dw, db = right(residuals, dy)
        return dx, dw, db * (1 + 1e-9)

    assert jnp.zeros(1).dtype == jnp.float32
    assert not linear.check(slightly_off)


def test_ranks_and_dtypes_may_be_mixed_in_an_attempt():
    def written_freely(residuals, dy):
        x, r, scale = residuals
        g = dy * scale * np.float32(1)
        return (g - x / r * (g * x / r).mean(1, keepdims=True)) / r, (dy * x / r).sum(0)

    assert bh.audit.exercise("rms_norm").check(written_freely)


ATTEMPTS = {
    "nothing": (lambda r, dy: None, "returned nothing", "a line: return dx, dw, db"),
    "an ellipsis": (lambda r, dy: ..., "returned nothing", "a line: return dx, dw, db"),
    "one of three": (
        lambda r, dy: right(r, dy)[0],
        "returned one cotangent; linear has 3 arguments, x, w, b.",
        "in their order: return dx, dw, db",
    ),
    "two of three": (lambda r, dy: right(r, dy)[:2], "returned 2 cotangents", "in their order"),
    "none for a weight": (
        lambda r, dy: (right(r, dy)[0], None, dy.sum(0)),
        "dw is None",
        "w moves the output",
    ),
    "an unsummed bias": (
        lambda r, dy: (*right(r, dy)[:2], dy),
        "db has shape (5, 7), and b has (7,)",
        "b was used more than once",
    ),
    "a transposed shape": (
        lambda r, dy: (right(r, dy)[0], right(r, dy)[1].T, dy.sum(0)),
        "dw has shape (7, 3), and w has (3, 7)",
        "in another order",
    ),
    "a single number": (
        lambda r, dy: (*right(r, dy)[:2], dy.sum()),
        "db has shape (), and b has (7,)",
        "needs its own",
    ),
    "integers": (
        lambda r, dy: (*right(r, dy)[:2], dy.sum(0).astype(int)),
        "db is int64, where an array of float64 is needed",
        "the dtype of its argument",
    ),
    "a narrower dtype": (
        lambda r, dy: (*right(r, dy)[:2], dy.sum(0).astype(jnp.float32)),
        "db is float32, and b is float64",
        "name none yourself",
    ),
    "text": (lambda r, dy: (*right(r, dy)[:2], "db"), "db is <U2", "of its argument"),
    "a function": (lambda r, dy: (*right(r, dy)[:2], right), "db is function", "of its argument"),
    "not a number": (
        lambda r, dy: (*right(r, dy)[:2], dy.sum(0) * jnp.nan),
        "db: ",
        "meets a zero",
    ),
    "a flipped sign": (
        lambda r, dy: (*right(r, dy)[:2], -dy.sum(0)),
        "db: the sign is flipped\nright: dx and dw",
        "db: when this argument rises",
    ),
    "zeros": (
        lambda r, dy: (right(r, dy)[0], 0 * r[1], dy.sum(0)),
        "dw: zero everywhere",
        "dw: change this argument a little",
    ),
    "a mean": (
        lambda r, dy: (*right(r, dy)[:2], dy.mean(0)),
        "db: 5.0 x too small",
        "What does it divide by",
    ),
    "twice as much": (lambda r, dy: (2 * right(r, dy)[0], *right(r, dy)[1:]), "dx: 2", "constant"),
}


@pytest.mark.parametrize("kind", ATTEMPTS)
def test_what_is_wrong_is_said_with_a_hint(kind, linear):
    attempt, said, hint = ATTEMPTS[kind]
    verdict = linear.check(attempt)
    assert not verdict
    assert said in verdict.message
    assert hint in verdict.hint
    assert str(verdict) == f"{verdict.message}\nHint: {verdict.hint}"


def test_a_cotangent_of_integers_is_refused():
    verdict = bh.audit.exercise("embedding").check(lambda r, dy: (0 * r[0], r[1]))
    assert "ids holds int32 numbers, which cannot move a little" in verdict.message
    assert verdict.hint == "return None in its place."


def test_an_attempt_that_raises_is_shown_its_own_line(linear):
    def attempt(residuals, dy):
        x, w = residuals
        return dy @ w, x.T @ dy, dy.sum(0)

    verdict = linear.check(attempt)
    assert verdict.message.startswith("your backward raised TypeError: dot_general requires")
    assert verdict.message.endswith("return dy @ w, x.T @ dy, dy.sum(0)")
    assert isinstance(verdict.error, TypeError)
    assert "\n" not in verdict.message


def test_what_is_no_function_is_refused(linear, unchecked):
    with pytest.raises(TypeError, match=r"your function backward\(residuals, dy\) itself.*tuple"):
        linear.check((1, 2, 3))


def test_hints_say_more_each_time_and_end(linear):
    count = len(linear.task.hints)
    given = [linear.hint() for _ in range(count)]
    assert [hint[:7] for hint in given] == [f"{i + 1} of {count}:" for i in range(count)]
    assert linear.hint().startswith("No hints are left")
    assert bh.audit.exercise("linear").hint() == given[0]


def test_the_answer_is_shown_only_to_those_who_ask(linear):
    with pytest.raises(ValueError, match=r"by solution\(reveal=True\)"):
        linear.solution()
    assert "dy @ w.T" in linear.solution(reveal=True)


def test_a_verdict_names_the_causes(linear):
    verdict = linear.check(lambda residuals, dy: tuple(-d for d in right(residuals, dy)))
    assert {name: cause.kind for name, cause in verdict.causes.items()} == dict.fromkeys(
        ("dx", "dw", "db"), "sign"
    )


def test_exercises_share_no_state(linear):
    linear.hint()
    assert Exercise(linear.task).hint().startswith("1 of")
