"""Linear maps: the textbook products, in the right dtypes, for any rank."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import backhand as bh
from tests.support import assert_close, normal


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(max_examples=8)
def test_blame_goes_through_the_weights_and_to_them(lead, inputs, outputs, bias):
    with jax.enable_x64(True):
        x, w, dy = normal(0, *lead, inputs), normal(1, inputs, outputs), normal(2, *lead, outputs)
        b = normal(3, outputs) if bias else None
        y, residuals = bh.ops.linear.forward(x, w, b)
        dx, dw, db = bh.ops.linear.backward(residuals, dy)
        rows, errors = x.reshape(-1, inputs), dy.reshape(-1, outputs)
        expected = (rows @ w).reshape(*lead, outputs)
        assert_close(y, expected if b is None else expected + b.reshape(*[1] * len(lead), -1))
        assert_close((dx, dw), ((errors @ w.T).reshape(x.shape), rows.T @ errors))
        assert db is None if b is None else jnp.allclose(db, errors.sum(0), 1e-12)


def test_bfloat16_activations_give_float32_weight_gradients():
    x, w, b = jnp.ones((4096, 2), jnp.bfloat16), jnp.ones((2, 3)), jnp.ones(3)
    y, residuals = bh.ops.linear.forward(x, w, b)
    dx, dw, db = bh.ops.linear.backward(residuals, jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == ("bfloat16", "bfloat16", "float32", "float32")
    assert (dw == 4096).all() and (db == 4096).all()


def test_shapes_that_do_not_fit_are_refused(unchecked, nothing_compiles):
    def run(x, w, b=None):
        shapes = [jax.ShapeDtypeStruct(s, "float32") for s in (x, w, b) if s is not None]
        return jax.eval_shape(bh.ops.linear, *shapes)

    with nothing_compiles():
        with pytest.raises(
            ValueError, match=r"x of shape \(..., 4\) for weights \(4, 3\), got \(2, 5"
        ):
            run((2, 5), (4, 3))
        with pytest.raises(ValueError, match=r"for weights \(4, 3\), got \(\)"):
            run((), (4, 3))
        with pytest.raises(ValueError, match=r"linear needs x .* for weights \(4,\)"):
            run((2, 4), (4,))
        with pytest.raises(ValueError, match=r"a bias of shape \(3,\), got \(4,\)"):
            run((2, 4), (4, 3), (4,))
        with pytest.raises(TypeError, match="linear needs floating-point input, got int32"):
            x = jax.ShapeDtypeStruct((2, 4), "int32")
            jax.eval_shape(bh.ops.linear, x, jax.ShapeDtypeStruct((4, 3), "float32"))
