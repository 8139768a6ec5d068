"""Weight standardization: what it makes equal, and its blame orthogonal to what it removes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal


@settings(max_examples=200)
@given(
    st.sampled_from([(6, 4), (2, 1), (3, 2, 4), (3, 3, 2, 4), (2, 2, 2, 1, 3)]),
    st.sampled_from([1e-5, 1e-2]),
    st.floats(-3, 3),
    st.integers(0, 1000),
)
def test_any_shape_and_mean_has_the_gradient_of_the_textbook_form(shape, eps, mean, seed):
    w = mean + np.random.default_rng(seed).standard_normal(shape)
    op = bh.ops.weight_standardization
    assert_is_its_reference(op, (w,), seed, floor=1e-12, eps=eps)


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4), (3, 3, 2, 4)])
def test_every_output_has_weights_of_mean_zero_and_variance_one(shape, x64):
    w, axes = 5 + 3 * normal(0, *shape), tuple(range(len(shape) - 1))
    h, residuals = bh.ops.weight_standardization.forward(w, eps=0.0)
    assert_close(h.mean(axes), jnp.zeros(4), floor=1e-13)
    assert_close(h.var(axes), jnp.ones(4))
    dw = bh.ops.weight_standardization.backward(residuals, normal(1, *shape), eps=0.0)
    for direction in (jnp.ones_like(h), h):
        assert jnp.max(jnp.abs(jnp.sum(dw * direction, axes))) < 1e-13


def test_a_large_mean_does_not_cancel():
    w = normal(0, 64, 4)
    off = bh.ops.weight_standardization(w + 1000) - bh.ops.weight_standardization(w)
    assert np.abs(off).max() < 1e-3


def test_a_vector_and_integers_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"weight_standardization needs w of shape .*got \(3,\)"):
        bh.ops.weight_standardization.forward(jnp.ones(3))
    with pytest.raises(TypeError, match="weight_standardization needs floating-point"):
        bh.ops.weight_standardization.forward(jnp.ones((3, 3), jnp.int32))
