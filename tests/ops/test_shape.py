"""Reshape, flatten, cast: numbers move and come back."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import backhand as bh
from tests.support import assert_identical, normal


@given(st.permutations([2, 3, 4]), st.integers(0, 5), st.booleans())
def test_backward_undoes_the_move(shape, batch, free):
    x = normal(0, batch, 24)
    target = (-1, *shape[1:]) if free and batch else tuple(shape)
    y, residuals = bh.ops.reshape.forward(x, shape=target)
    assert y.shape == (batch, *shape)
    assert_identical(bh.ops.reshape.backward(residuals, y, shape=target), x)
    flat, residuals = bh.ops.flatten.forward(y)
    assert_identical(flat, x)
    assert_identical(bh.ops.flatten.backward(residuals, flat), y)


def test_integers_can_be_moved_too():
    ids = jnp.arange(6).reshape(2, 3)
    assert bh.ops.flatten(ids[:, :, None]).dtype == ids.dtype
    assert bh.ops.reshape(ids, shape=(3, 1)).tolist() == ids[..., None].tolist()


@pytest.mark.parametrize("source", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("target", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_cast_brings_its_error_back_in_its_own_dtype(source, target):
    x = jnp.asarray([1.0, -2.5, 1 / 3], source)
    y, residuals = bh.ops.cast.forward(x, dtype=target)
    assert y.dtype == target
    assert_identical(y, x.astype(target))
    dx = bh.ops.cast.backward(residuals, y, dtype=target)
    assert dx.dtype == source
    assert np.isfinite(np.asarray(dx, float)).all()


def test_moves_that_do_not_fit_are_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    x, scalar, ids = shape((2, 6), "float32"), shape((), "float32"), shape((2,), "int32")

    def run(op, x, **static):
        return jax.eval_shape(lambda x: op(x, **static), x)

    with nothing_compiles():
        for target in ((5,), (4, -1), (-1, -1), (0, -1)):
            with pytest.raises(ValueError, match=r"reshape needs examples of .*\(6,\): 6 elements"):
                run(bh.ops.reshape, x, shape=target)
        for op, static in ((bh.ops.reshape, {"shape": (1,)}), (bh.ops.flatten, {})):
            with pytest.raises(ValueError, match="needs x with a batch axis, got a scalar"):
                run(op, scalar, **static)
        with pytest.raises(TypeError, match="cast needs floating-point input, got int32"):
            run(bh.ops.cast, ids, dtype=jnp.float32)
        with pytest.raises(TypeError, match="cast needs a floating-point dtype, got int8"):
            run(bh.ops.cast, x, dtype=jnp.int8)
