"""The one verdict: rounding passes, mistakes do not, down to one element and 1e-9."""

import jax.numpy as jnp
import numpy as np
import pytest

from backhand.audit.gradient import Rounding, errors, judge, relative_errors, tolerance

RNG = np.random.default_rng(0)


def product(dtype=np.float64, rows=64, scale=None):
    """x^T dy of three random dy, in a dtype: a sum of `rows` terms in each of 40 x 30 elements."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 40)).astype(np.float32)
    if scale is not None:
        x = (x * scale).astype(np.float32)
    dy = rng.standard_normal((3, rows, 30)).astype(np.float32)
    return np.einsum("ri,sro->sio", x.astype(dtype), dy.astype(dtype))


TRUTH = product()


def one(ours, truth, autodiff=None, dtype=jnp.float64, context=None):
    given = None if autodiff is None else [autodiff]
    return judge(["w"], [ours], [truth], given, dtype, context)[0]


def test_the_truth_agrees_with_itself():
    verdict = one(TRUTH, TRUTH)
    assert (verdict.agrees, verdict.relative, verdict.difference) == (True, 0, 0)


@pytest.mark.parametrize("factor", [1 + 1e-9, 1 - 1e-9, -1, 0, 64])
def test_a_factor_is_seen_in_float64(factor):
    assert not one(TRUTH * factor, TRUTH).agrees


@pytest.mark.parametrize("place", [(0, 0), (3, 7), (39, 29)])
def test_one_wrong_element_is_seen_and_located(place):
    wrong = TRUTH.copy()
    wrong[(slice(None), *place)] *= 1 + 1e-9
    verdict = one(wrong, TRUTH)
    assert (verdict.agrees, verdict.where) == (False, place)


def test_one_wrong_element_is_seen_in_rows_that_are_smaller_by_many_orders():
    truth = product(scale=10.0 ** -np.arange(0, 5, 0.125))
    for row in (0, 20, 39):
        wrong = truth.copy()
        wrong[:, row, 3] *= 1 + 1e-9
        verdict = one(wrong, truth)
        assert (verdict.agrees, verdict.where) == (False, (row, 3))


def test_another_order_of_summation_is_rounding():
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((4096, 8)), rng.standard_normal((3, 4096, 8))
    truth = np.einsum("ri,sro->sio", x, dy)
    terms = x[::-1, None, :, None] * dy.transpose(1, 0, 2)[::-1, :, None]
    backwards = np.zeros_like(truth)
    for term in terms:
        backwards += term
    assert (backwards != truth).any()
    assert one(backwards, truth, context=Rounding(4096)).agrees


def test_a_true_gradient_of_zero_is_held_against_what_float32_shows():
    """A bias before a normalization: terms of size 1 that cancel."""
    rng = np.random.default_rng(3)
    truth, ours = 1e-16 * rng.standard_normal((2, 3, 8))
    coarse = np.abs(6e-8 * rng.standard_normal((3, 8)))
    assert one(ours, truth, context=Rounding(64, [coarse])).agrees
    assert not one(ours + 1e-9, truth, context=Rounding(64, [coarse])).agrees
    assert not one(ours, truth).agrees, "without float32 nothing says how large the terms are"


def test_a_float32_run_that_was_exact_by_luck_is_not_the_last_word():
    """x / |x|: the truth is zero, what both compute is rounding, and float32's one run has none."""
    rng = np.random.default_rng(4)
    truth, ours = 1e-14 * rng.standard_normal((2, 3, 8))
    asked = []

    def nearby():
        asked.append(True)
        return [np.full(8, 3e-5)]

    exact = Rounding(8, [np.zeros((3, 8))])
    assert not one(ours, truth, context=exact).agrees
    lucky = Rounding(8, [np.zeros((3, 8))], nearby)
    assert one(ours, truth, context=lucky).agrees
    assert not one(ours + 1e-9, truth, context=lucky).agrees, "a mistake does not shrink"
    low = (1e5 * ours).astype(np.float32)
    assert not one(low, truth, 0 * low, jnp.float32).agrees
    assert one(low, truth, 0 * low, jnp.float32, Rounding(8, None, nearby)).agrees
    asked.clear()
    assert one(truth, truth, context=lucky).agrees
    assert not asked, "what agrees needs no other points"


def test_a_mistake_does_not_excuse_itself_by_its_own_float32_run():
    wrong = TRUTH * 1.05
    coarse = errors(TRUTH, wrong.astype(np.float32), product(np.float32))
    assert not one(wrong, TRUTH, context=Rounding(64, [coarse])).agrees


def test_float32_may_be_as_inaccurate_as_autodiff_and_not_more():
    low = product(np.float32)
    assert one(low, TRUTH, low, jnp.float32).agrees
    assert not one(low * np.float32(1.001), TRUTH, low, jnp.float32).agrees
    wrong = low.copy()
    wrong[:, 3, 7] *= np.float32(1.001)
    assert not one(wrong, TRUTH, low, jnp.float32).agrees
    bad = low + np.float32(1e-3) * RNG.standard_normal(low.shape).astype(np.float32)
    assert not one(bad, TRUTH, low, jnp.float32).agrees
    assert one(bad, TRUTH, bad, jnp.float32).agrees, "autodiff is as bad"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_judged_by_its_own_rounding(dtype):
    low = np.asarray(TRUTH.astype(dtype), np.float64)
    assert one(low, TRUTH, low, dtype).agrees
    assert not one(low * 1.2, TRUTH, low, dtype).agrees


def test_what_is_not_finite_must_be_so_in_the_truth_or_in_autodiff():
    wrong = TRUTH.copy()
    wrong[1, 2, 3] = np.nan
    verdict = one(wrong, TRUTH)
    assert (verdict.agrees, verdict.where) == (False, (2, 3))
    assert one(wrong, wrong).agrees
    assert not one(TRUTH, wrong).agrees
    overflows = TRUTH.copy()
    overflows[:, 2, 3] = np.inf
    assert one(overflows, TRUTH, overflows, jnp.float16).agrees


def test_shapes_and_sizes_are_part_of_the_verdict():
    assert not one(TRUTH[:, :1], TRUTH).agrees
    nothing = np.zeros((3, 0, 4))
    assert one(nothing, nothing) == (True, 0.0, (), tolerance(jnp.float64), 0.0)
    scalar = np.array([1.0, 2.0, -1.0])
    assert one(scalar, scalar).agrees
    assert one(scalar * (1 + 1e-9), scalar).where == ()
    assert not one(scalar * (1 + 1e-9), scalar).agrees


def test_a_single_gradient_is_judged_by_its_leaf():
    truth = TRUTH[:1]
    assert one(truth + 1e-14, truth).agrees
    assert not one(truth * (1 + 1e-9), truth).agrees


def test_tolerances_grow_with_the_dtype_and_the_root_of_the_length():
    assert tolerance(jnp.float64, 10**6) < 1e-11
    assert tolerance(jnp.float32, 10**6) < 1e-3
    assert tolerance(jnp.float32, 1) == pytest.approx(17 * 2**-23)
    assert tolerance(jnp.bfloat16, 1) == pytest.approx(16 * 2**-7, rel=1e-3)


def test_errors_are_relative_to_the_leaf_or_to_the_largest_where_it_is_zero():
    truth = [np.ones((3, 4)), np.full((3, 4), 1e-17), np.zeros((3, 0))]
    runs = [np.full((3, 4), 1.5), np.full((3, 4), 0.25), np.zeros((3, 0))]
    assert relative_errors(runs, truth) == pytest.approx([0.5, 0.25, 0.0])
    assert relative_errors([np.ones((3, 2))], [np.ones((3, 4))]) == [np.inf]


def test_errors_are_those_of_the_finite_and_a_nan_of_ours_alone_is_one():
    truth = np.array([[np.nan, 2.0, np.inf, 2.0]])
    ours = np.array([[np.nan, 3.0, np.inf, 1.0]])
    assert relative_errors([ours, truth[:, :1]], [truth, truth[:, :1]]) == pytest.approx(
        [0.5, np.nan], nan_ok=True
    )
    ours[0, 1] = np.nan
    assert relative_errors([ours], [truth]) == [np.inf]
    assert not one(ours, truth, truth, jnp.float32).agrees


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_a_leaf_further_than_autodiff_is_seen_below_float32(dtype):
    """As where a sum runs in the low dtype: each element is within 16 roundings of its terms."""
    rounded = np.asarray(jnp.asarray(TRUTH, dtype), np.float64)
    eps = float(jnp.finfo(dtype).eps)
    noise = eps * RNG.standard_normal(TRUTH.shape) * np.abs(TRUTH)
    assert one(TRUTH + 2 * noise, TRUTH, rounded, dtype).agrees
    assert not one(TRUTH + 5 * noise, TRUTH, rounded, dtype).agrees
    assert one(TRUTH + 5 * noise, TRUTH, TRUTH - 2 * noise, dtype).agrees
