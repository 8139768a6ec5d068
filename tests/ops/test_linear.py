"""Linear maps: the textbook products, in the right dtypes, for any rank."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import backhand as bh
from tests.ops.reference import assert_is_its_reference


@settings(max_examples=200)
@given(
    st.sampled_from([(), (1,), (3,), (2, 3), (2, 0), (2, 1, 3)]),
    st.sampled_from([(1, 1), (4, 2), (3, 5), (2, 0)]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_blame_goes_through_the_weights_and_to_them(lead, weights, bias, seed):
    random = np.random.default_rng(seed)
    x, w = random.standard_normal((*lead, weights[0])), random.standard_normal(weights)
    b = random.standard_normal(weights[1:]) if bias else None
    assert_is_its_reference(bh.ops.linear, (x, w, b), seed)


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
