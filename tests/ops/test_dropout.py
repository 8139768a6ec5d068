"""Dropout: the mean stays, the mask is made again and not stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_identical

KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_mean_stays_and_the_share_is_dropped(rate):
    x = jnp.ones((64, 1001))
    y = np.asarray(bh.ops.dropout(x, KEY, rate=rate))
    dropped = np.mean(y == 0)
    spread = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(dropped - rate) <= 5 * spread
    assert abs(y.mean() - 1) <= 5 * spread / (1 - rate) + 1e-6
    assert np.unique(y[y != 0]) == pytest.approx([1 / (1 - rate)], rel=1e-4)


@settings(max_examples=200)
@given(
    st.sampled_from([(1,), (5,), (2, 3), (2, 0), (2, 1, 3)]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    st.integers(0, 1000),
)
def test_any_shape_rate_and_key_has_the_gradient_of_autodiff(shape, rate, seed):
    x = np.random.default_rng(seed).standard_normal(shape)
    assert_is_its_reference(bh.ops.dropout, (x, jax.random.key(seed)), seed, rate=rate)


def test_backward_drops_what_forward_dropped():
    x = jnp.ones((7, 9))
    y, residuals = bh.ops.dropout.forward(x, KEY, rate=0.4)
    dx, dkey = bh.ops.dropout.backward(residuals, x, rate=0.4)
    assert_identical(dx, y)
    assert dkey is None
    assert jax.tree.leaves(residuals)[0].shape == ()  # a key, and no mask


def test_neighbours_and_rows_are_dropped_independently():
    """Two inputs share a random word; each of them has its own half of the bits."""
    kept = np.asarray(bh.ops.dropout(jnp.ones((256, 256)), KEY, rate=0.5)) != 0
    for a, b in (
        (kept[:, ::2], kept[:, 1::2]),
        (kept[::2], kept[1::2]),
        (kept[:, :128], kept[:, 128:]),
    ):
        assert abs(np.mean(a == b) - 0.5) < 5 * 0.5 / np.sqrt(a.size)


def test_a_dropped_input_may_be_anything():
    x = jnp.full(512, jnp.inf)
    y = np.asarray(bh.ops.dropout(x, KEY, rate=0.5))
    assert set(np.unique(y)) == {0, np.inf}


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0), (2, 3, 5)])
def test_any_shape_and_dtype_is_kept(shape):
    for dtype in (jnp.float32, jnp.bfloat16):
        y = bh.ops.dropout(jnp.ones(shape, dtype), KEY, rate=0.5)
        assert (y.shape, y.dtype) == (shape, dtype)


def test_a_rate_that_is_no_share_is_refused(unchecked, nothing_compiles):
    x = jax.ShapeDtypeStruct((3,), "float32")
    with nothing_compiles():
        for rate in (-0.1, 1.0, float("nan")):
            with pytest.raises(ValueError, match=r"a rate in \[0, 1\), the share that is dropped"):
                jax.eval_shape(lambda x, rate=rate: bh.ops.dropout(x, KEY, rate=rate), x)
            with pytest.raises(ValueError, match=r"a rate in \[0, 1\)"):
                bh.dropout(rate)
        with pytest.raises(TypeError, match="dropout needs floating-point input, got int32"):
            jax.eval_shape(lambda x: bh.ops.dropout(x.astype(int), KEY, rate=0.5), x)
        for key in (None, 0):
            with pytest.raises(TypeError, match="key must be typed, made by"):
                jax.eval_shape(lambda x, key=key: bh.ops.dropout(x, key, rate=0.5), x)
