"""The order of the detectors, and what they may say."""

import ast
import inspect

import numpy as np
import pytest

from backhand.audit import paths
from backhand.audit.diagnosis import DETECTORS, KINDS, diagnose, hypotheses, relations, support
from backhand.audit.diagnosis.pair import Context

TRUTH = np.random.default_rng(0).normal(size=(3, 4, 5))


def test_every_cause_has_a_kind_in_the_table():
    used = {
        node.args[0].value
        for module in (relations, support, hypotheses, paths)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Cause", "Mistake")
    }
    assert used == set(KINDS)


def test_no_cause_where_the_two_agree():
    assert diagnose(TRUTH, TRUTH) is None
    assert diagnose(TRUTH * (1 + 1e-7), TRUTH, context=Context(noise=1e-6)) is None
    assert diagnose(TRUTH[:, :0], TRUTH[:, :0]) is None


def test_a_scalar_and_a_single_cotangent_have_causes_too():
    assert diagnose(np.array([-2.0]), np.array([2.0])).kind == "sign"
    assert diagnose(2 * TRUTH[:1], TRUTH[:1]).kind == "factor"


@pytest.mark.parametrize("seed", range(20))
def test_any_difference_has_some_cause_in_one_line(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, rng.integers(0, 4)))
    truth, ours = rng.normal(size=(2, 3, *shape)) * (rng.random((2, 3, *shape)) < 0.7)
    cause = diagnose(ours, truth, path="w")
    assert cause is None or (cause.kind in KINDS and "\n" not in cause.message)


def test_the_last_word_is_how_similar_the_two_are():
    names = [detector.__name__ for detector in DETECTORS]
    assert len(set(names)) == len(names)
    assert "cosine" in diagnose(TRUTH[::-1, ::-1, ::-1] ** 3, TRUTH).message
