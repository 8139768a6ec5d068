"""A task's numbers: what a backward is tried with."""

import jax
import numpy as np

import backhand as bh
from backhand.audit.exercises.task import CALLS


def test_the_truth_is_what_jax_makes_of_the_forward(x64):
    task = bh.audit.exercise("layer_norm").task
    problem = task.problem
    assert {leaf.dtype for leaf in problem.arguments} == {np.dtype(np.float64)}
    for call, dy in enumerate(problem.errors):
        expected = jax.vjp(lambda *args: task.forward(*args)[0], *problem.arguments)[1](dy)
        for place, leaf in enumerate(expected):
            np.testing.assert_allclose(problem.truth[place][call], leaf, rtol=1e-12, atol=1e-14)


def test_errors_are_random_and_differ(x64):
    errors = bh.audit.exercise("mean").task.problem.errors
    assert len(errors) == CALLS
    assert len({float(dy) for dy in errors}) == CALLS


def test_integers_have_no_truth(x64):
    assert list(bh.audit.exercise("embedding").task.problem.truth) == [0]


def test_the_numbers_are_made_once(x64):
    task = bh.audit.exercise("sum").task
    assert task.problem is task.problem
