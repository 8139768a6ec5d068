"""The Taylor test tells right slopes, wrong ones and kinks from the function's values alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backhand.audit.runs import Runs
from backhand.audit.subjects import subject_of
from backhand.audit.taylor import HALVINGS, MOST_LEAVES, SCALES, classify, taylor
from tests.support import normal

EPS = 2.0**-52


def sampled(f):
    """Steps along a line, of one function of the step."""
    steps = np.asarray(SCALES)[:, None, None] * np.asarray(HALVINGS)[:, None] * np.array([1.0, -1])
    return (f(steps) - f(np.zeros(())))[..., None]


def kind(f, slope):
    return classify(np.array([slope]), sampled(f), np.array([2.0]), EPS).kind


CASES = {
    "second order": (np.exp, 1.0),
    "exactly linear": (lambda h: 3 * h, 3.0),
    "at round-off": (lambda h: 1.0 + 0 * h, 0.0),
    "kink suspected": (lambda h: np.abs(h), 0.0),
    "linear between kinks": (lambda h: np.maximum(h - 0.02, 0) + h + 1, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_right_slope_is_classified(name):
    assert kind(*CASES[name]) == name


@pytest.mark.parametrize("factor", [1.05, 1.001, 1 + 1e-5, -1, 0])
@pytest.mark.parametrize("name", ["second order", "exactly linear"])
def test_a_wrong_slope_is_wrong_however_smooth(name, factor):
    f, slope = CASES[name]
    assert kind(f, factor * slope) == "WRONG"


def test_a_slope_that_is_not_finite_is_wrong():
    assert kind(np.exp, np.nan) == "WRONG"


def test_the_remainder_falls_four_times():
    slope = classify(np.array([1.0]), sampled(np.exp), np.array([2.0]), EPS)
    assert slope.ratio == pytest.approx(4, abs=0.1)
    assert slope.measured == pytest.approx(1, abs=1e-6)


def findings(function, *args, reference=None):
    return taylor(Runs(subject_of(function, args, reference)))


def test_a_plain_function_is_the_derivative_of_itself():
    (smooth,) = findings(jnp.sin, normal(0, 3))
    assert smooth.passed and "second order" in smooth.message
    linear, other = findings(jnp.dot, normal(0, 3), normal(1, 3))
    assert "exactly linear" in linear.message and "exactly linear" in other.message


def test_kinks_are_suspected_and_no_mistake():
    (finding,) = findings(jnp.abs, jnp.zeros(4))
    assert finding.passed and "kink suspected" in finding.message


def test_a_wrong_reference_is_told_from_a_wrong_rule():
    def stopped(x):
        return jnp.sin(jax.lax.stop_gradient(x)) + x

    ours, theirs = findings(lambda x: jnp.sin(x) + x, normal(0, 3), reference=stopped)
    assert ours.passed
    assert not theirs.passed
    assert theirs.message.startswith("the reference's gradient is not the derivative")


def test_a_gradient_that_both_sides_stop_is_meant():
    stop = jax.lax.stop_gradient
    both = findings(
        lambda x, y: x * stop(y), normal(0, 3), normal(1, 3), reference=lambda x, y: x * stop(y)
    )
    assert all(finding.passed for finding in both)
    assert {f.path for f in both if "stopped on purpose" in f.message} == {"y"}


def test_many_leaves_move_together_until_one_is_wrong():
    leaves = {f"p{i:02d}": normal(i, 2) for i in range(14)}

    def total(tree):
        return sum(jnp.sin(leaf) for leaf in tree.values())

    right = findings(total, leaves)
    assert len(right) == MOST_LEAVES and all(finding.passed for finding in right)

    def backward(tree, dy):
        slopes = {path: dy * jnp.cos(leaf) for path, leaf in tree.items()}
        return ({**slopes, "p05": 1.5 * slopes["p05"]},)

    rule = jax.custom_vjp(total)
    rule.defvjp(lambda tree: (total(tree), tree), backward)
    assert [f.path for f in findings(rule, leaves) if not f.passed] == ["tree/p05"]


def test_values_too_coarse_for_small_steps_are_skipped():
    (finding,) = findings(lambda x: x.astype(jnp.bfloat16), normal(0, 3))
    assert finding.skipped and "bfloat16" in finding.message
