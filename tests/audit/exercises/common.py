"""What holds for every exercise."""

import jax
import pytest

import backhand as bh

ALIKE = {("mean_squared_error", "sign"): {"swapped"}}
"""The two sides of a difference have each other's gradient, but for the sign."""


def every(tasks):
    """The exercises of a file, as a test's parameters."""
    return pytest.mark.parametrize("name", [task.name for task in tasks])


def changed(name, change):
    """The answer with another cotangent for each argument."""
    task = bh.audit.exercise(name).task
    return lambda residuals, dy: jax.tree.map(change, task.backward(residuals, dy))


def check_answer(name):
    """The answer is right, and neither None, zeros nor a flipped sign are."""
    exercise = bh.audit.exercise(name)
    assert exercise.check(exercise.task.backward), str(exercise.check(exercise.task.backward))
    assert "returned nothing" in exercise.check(lambda residuals, dy: None).message
    for change, kind in ((lambda d: 0 * d, "zero"), (lambda d: -d, "sign")):
        verdict = exercise.check(changed(name, change))
        assert not verdict
        assert {cause.kind for cause in verdict.causes.values()} in (
            {kind},
            ALIKE.get((name, kind)),
        )
        assert len(verdict.causes) == len(exercise.task.problem.truth)
