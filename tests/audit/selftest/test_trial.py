"""A row at one size gives right passes, and wrong ones on demand."""

import jax.numpy as jnp
import numpy as np
import pytest

from backhand import ops
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.trial import F32, F64, Trial
from backhand.catalogue import ROWS


@pytest.fixture(scope="module")
def trial():
    return Trial(next(row for row in ROWS if row.subject is ops.layer_norm), B=6)


def test_the_right_pass_is_near_the_truth_in_both_dtypes(trial):
    truth = trial.at(F64).automatic
    for dtype, limit in ((F32, 1e-5), (F64, 1e-13)):
        assert not trial.right[dtype].faults
        for ours, leaf in zip(trial.right[dtype].leaves, truth, strict=True):
            np.testing.assert_allclose(ours, leaf, atol=limit * np.abs(leaf).max())


def test_both_dtypes_begin_with_the_same_numbers(trial):
    for low, high in zip(trial.at(F32).arguments, trial.at(F64).arguments, strict=True):
        assert (low.dtype, high.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_array_equal(np.asarray(low, np.float64), high)


def test_there_is_a_site_for_each_leaf_and_twins_have_one_shape(trial):
    assert [site.place for site in trial.sites] == [(0, 0), (1, 0), (2, 0)]
    assert [site.twin for site in trial.sites] == [None, (2, 0), (1, 0)]
    assert {site.batch for site in trial.sites} == {6}


def test_a_bug_changes_its_leaf_in_both_dtypes(trial):
    wrong = trial.wrong(BUGS["sign"], trial.sites[1])
    for dtype in (F32, F64):
        for index, right in enumerate(trial.right[dtype].leaves):
            sign = -1 if index == 1 else 1
            np.testing.assert_array_equal(wrong[dtype].leaves[index], sign * right)


def test_a_bug_of_structure_is_a_fault_of_its_leaf(trial):
    for kind in ("an axis of one too many", "wrong dtype"):
        wrong = trial.wrong(BUGS[kind], trial.sites[2])
        assert wrong[F64].faults == {"offset"}


def test_a_mistake_in_an_equation_of_the_reference_is_a_bug(trial):
    wrong = trial.wrong(BUGS["a sum taken for a constant"], trial.sites[0])
    for dtype in (F32, F64):
        off = np.abs(wrong[dtype].leaves[0] - trial.right[dtype].leaves[0])
        assert off.max() > 0.01
        assert not wrong[dtype].faults


def test_other_seeds_are_other_points(trial):
    first, second = (trial.at(F64, seed) for seed in (0, 1))
    assert not np.array_equal(first.arguments[0], second.arguments[0])
    assert not np.array_equal(first.dys[0], second.dys[0])


def test_a_setting_that_can_be_left_out_is_an_alternative(trial):
    row = next(row for row in ROWS if row.subject is ops.layer_norm and row.settings)
    with_setting = Trial(row)
    assert list(with_setting.context.alternatives) == ["eps=1e-05"]
    assert not trial.context.alternatives
    wrong = with_setting.wrong(BUGS["a setting ignored"], with_setting.sites[0])
    assert wrong is None or set(wrong) == {F32, F64}
