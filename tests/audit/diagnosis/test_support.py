"""Where a gradient differs says why."""

import numpy as np
import pytest

from backhand.audit.diagnosis import diagnose
from backhand.audit.diagnosis.pair import Context

TRUTH = np.random.default_rng(0).normal(size=(3, 8, 5))


def wrong(chosen, factor):
    """The truth, some elements of the leaf multiplied."""
    ours = TRUTH.copy()
    ours[(slice(None), *chosen)] *= factor
    return ours


def test_one_element_is_given_with_its_index():
    cause = diagnose(wrong((3, 2), 1 + 1e-6), TRUTH)
    assert cause.kind == "element"
    assert "at [3, 2]" in cause.message


@pytest.mark.parametrize(
    ("chosen", "factor", "text"),
    [
        (np.s_[6:, :], 0, "only slices from 6 on of axis 0: they are zero"),
        (np.s_[-1:, :], 0, "only the last slice of axis 0"),
        (np.s_[:1, :], 2, "only the first slice of axis 0: the border of a block"),
        (np.s_[2:5, :], 2, "only slices 2 to 4 of axis 0"),
        (np.s_[::3, :], 2, "only every third slice from 0 of axis 0: a stride"),
        (np.s_[:, ::2], 2, "only every second slice from 0 of axis 1"),
        (np.s_[[0, 1, 5], :], 2, "only slices 0, 1, 5 of axis 0"),
        (np.s_[4:, 3:], 2, "only slices from 4 on of axis 0 and slices from 3 on of axis 1"),
    ],
)
def test_a_block_is_described(chosen, factor, text):
    cause = diagnose(wrong(chosen, factor), TRUTH)
    assert cause.kind == "block"
    assert text in cause.message


def test_slices_that_are_zero_in_truth_say_nothing_of_a_block():
    truth = TRUTH.copy()
    truth[:, 5:] = 0
    ours = truth.copy()
    ours[:, 3:] = 0
    assert "slices from 3 on of axis 0" in diagnose(ours, truth).message


def test_the_first_slice_that_has_a_gradient_is_not_the_first():
    truth = TRUTH.copy()
    truth[:, 0] = 0
    ours = truth.copy()
    ours[:, 1] *= 2
    assert "only slice 1 of axis 0" in diagnose(ours, truth).message


def test_elements_here_and_there_are_no_block():
    ours = TRUTH.copy()
    scattered = np.zeros((8, 5), bool)
    scattered[[0, 1, 3, 4, 6], [0, 2, 1, 4, 3]] = True
    ours[:, scattered] *= 1.5
    assert diagnose(ours, TRUTH).kind != "block"


def test_small_slices_that_are_wrong_count_as_much_as_large_ones():
    truth = TRUTH * np.array([1, 1, 1, 1, 1e-6])
    assert diagnose(1.5 * truth + 0.5 * np.roll(truth, 1, 1), truth).kind != "block"


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_what_is_not_finite_is_located(value, what):
    ours = TRUTH.copy()
    ours[1, 2, 3] = value
    cause = diagnose(ours, TRUTH)
    assert cause.kind == "not finite"
    assert cause.message == f"{what} in 1 of 40 elements, at [2, 3]"


def test_a_nan_of_the_truth_is_no_mistake():
    truth = TRUTH.copy()
    truth[:, 0, 0] = np.nan
    assert diagnose(truth, truth) is None
    assert diagnose(np.nan_to_num(truth), truth).kind == "not finite"


def test_a_kink_is_where_an_input_is_zero():
    x = np.random.default_rng(1).normal(size=(8, 5))
    x[[1, 4], [2, 0]] = 0
    ours = np.where(x == 0, TRUTH / 2, TRUTH)
    cause = diagnose(ours, TRUTH, context=Context(inputs={"x": x}))
    assert (cause.kind, cause.message) == ("kink", "differs only where `x` is 0: a kink")


def test_a_fresh_bias_is_zero_everywhere_and_no_kink():
    x, other = np.zeros((8, 5)), np.zeros((8, 5))
    cause = diagnose(0.3 * TRUTH + 0.1, TRUTH, context=Context(inputs={"x": x, "z": other}))
    assert cause.kind != "kink"


def test_a_tie_is_where_two_inputs_are_equal():
    a = np.arange(40.0).reshape(8, 5)
    b = np.where(a % 7 == 0, a, -a - 1)
    ours = np.where(a == b, TRUTH / 2, TRUTH)
    cause = diagnose(ours, TRUTH, context=Context(inputs={"a": a, "b": b}))
    assert (cause.kind, cause.message) == ("kink", "differs only where `a` equals `b`: a tie")


def test_a_mask_that_is_not_applied_shows_where_the_truth_is_zero():
    mask = np.random.default_rng(1).random((8, 5)) < 0.7
    cause = diagnose(TRUTH, TRUTH * mask)
    assert cause.kind == "unmasked"
    assert "a mask is not applied" in cause.message
