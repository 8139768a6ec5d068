"""When a relation explains a difference, and best fits."""

import numpy as np
import pytest

from backhand.audit.diagnosis.pair import Context, Pair, cosine, fit


@pytest.fixture
def truth():
    return np.random.default_rng(0).normal(size=(3, 4, 5))


def test_a_relation_explains_the_difference_if_next_to_nothing_is_left_over(truth):
    pair = Pair(3 * truth, truth, {}, Context())
    assert pair.explains(3 * truth)
    assert pair.explains(3.01 * truth)
    assert not pair.explains(2.9 * truth)


def test_rounding_does_not_spoil_an_explanation(truth):
    noise = 1e-6 * np.random.default_rng(1).normal(size=truth.shape)
    pair = Pair(truth * (1 + 1e-5) + noise, truth, {}, Context(noise=1e-5))
    assert pair.explains(truth * (1 + 1e-5))


def test_nothing_explains_what_does_not_differ(truth):
    assert not Pair(truth, truth, {}, Context()).explains(truth)


def test_noise_as_large_as_the_difference_explains_nothing_by_itself(truth):
    pair = Pair(1.001 * truth, truth, {}, Context(noise=1.0))
    assert not pair.explains(truth)


def test_the_fit_is_the_nearest_factor_along_the_axes_given(truth):
    factors = np.array([1.0, -2.0, 3.0, 0.5])[:, None]
    assert fit(2 * truth, truth) == pytest.approx(2)
    np.testing.assert_allclose(fit(factors * truth, truth, (0, 2))[0], factors)
    assert fit(truth, 0 * truth) == 0


def test_the_cosine_knows_direction_alone(truth):
    assert cosine(-5 * truth, truth) == pytest.approx(-1)
    assert cosine(truth, 0 * truth) == 0
