"""A row's numbers, and the cause of a difference."""

import dataclasses

import numpy as np
import pytest

from backhand.audit.diagnosis.pair import Context
from backhand.audit.rows import explained, row_of

OTHER = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def test_equal_gradients_agree():
    row = row_of("w", OTHER, OTHER, 1e-6)
    assert (row.agrees, row.difference, row.cosine) == (True, 0, pytest.approx(1))
    assert (row.shape, row.dtype) == ((6, 4), "float32")
    assert row.gradients[0].dtype == np.float64


def test_the_largest_difference_is_located():
    wrong = OTHER.copy()
    wrong[4, 1] += 1
    row = row_of("w", wrong, OTHER, 1e-6)
    assert (row.agrees, row.where) == (False, (4, 1))
    assert row.difference == pytest.approx(1, rel=1e-6)


def test_norms_must_agree_more_closely_than_elements():
    assert row_of("w", OTHER * np.float32(1.0009), OTHER, 1e-3).agrees is False
    assert row_of("w", OTHER * np.float32(1.0002), OTHER, 1e-3).agrees


def test_a_difference_below_the_floor_is_rounding():
    zeros = np.zeros((3,), np.float32)
    assert not row_of("b", zeros + np.float32(1e-9), zeros, 1e-6).agrees
    assert row_of("b", zeros + np.float32(1e-9), zeros, 1e-6, floor=1e-8).agrees


def test_what_is_not_finite_is_noted():
    row = row_of("w", np.full(3, np.nan), np.ones(3), 1e-6)
    assert (row.agrees, row.note) == (False, "NaN or Inf in the gradient")


def test_a_difference_is_explained_with_the_batch():
    wrong = row_of("w", 32 * OTHER, OTHER, 1e-6)
    right = row_of("b", OTHER[0], OTHER[0], 1e-6)
    found = explained([wrong, right], lambda: Context(batch=32))
    assert [row.cause.kind if row.cause else None for row in found] == ["mean", None]
    assert "32" in found[0].cause.message
    stacked = dataclasses.replace(wrong, gradients=(np.stack([-OTHER] * 3), np.stack([OTHER] * 3)))
    assert explained([stacked], Context)[0].cause.kind == "sign"
    assert explained([right], pytest.fail) == [right]
