"""Activations: known values, kinks as JAX has them, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal

ELEMENTWISE = {
    "relu": (bh.ops.relu, jax.nn.relu),
    "leaky_relu": (bh.ops.leaky_relu, jax.nn.leaky_relu),
    "sigmoid": (bh.ops.sigmoid, jax.nn.sigmoid),
    "tanh": (bh.ops.tanh, jnp.tanh),
    "gelu": (bh.ops.gelu, lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu by tanh": (bh.ops.gelu.bind(approximate=True), jax.nn.gelu),
    "silu": (bh.ops.silu, jax.nn.silu),
    "softplus": (bh.ops.softplus, jax.nn.softplus),
    "elu": (bh.ops.elu, jax.nn.elu),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_values_and_slopes_are_those_of_jax_at_zero_and_at_extremes(x64, name):
    """At a kink too: relu'(0) = 0, leaky_relu'(0) = 1, elu'(0) = alpha exp(0)."""
    ours, theirs = ELEMENTWISE[name]
    x = jnp.asarray([0.0, -0.0, 1e-9, -1e-9, 0.5, -0.5, 3.0, -3.0, 40.0, -40.0, 700.0, -700.0])

    @jax.jit
    def run(x):
        return [(f(x), jax.vmap(jax.grad(f))(x)) for f in (ours, theirs)]

    assert_close(*run(x))


OPS = [*(op for op, _ in ELEMENTWISE.values()), bh.ops.softmax]


@settings(max_examples=200)
@given(
    st.sampled_from(range(len(OPS))),
    st.sampled_from([(1,), (5,), (2, 3), (2, 1, 3)]),
    st.sampled_from([1e-3, 1.0, 10.0, 300.0]),
    st.integers(0, 1000),
)
def test_any_shape_and_size_has_the_gradient_of_autodiff(index, shape, size, seed):
    x = size * np.random.default_rng(seed).standard_normal(shape)
    assert_is_its_reference(OPS[index], (x,), seed, floor=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_large_inputs_neither_overflow_nor_lose_their_dtype(name, dtype):
    x = jnp.asarray([1e4, -1e4, 88.0, -88.0, 0.0], dtype)
    y, residuals = ELEMENTWISE[name][0].forward(x)
    dx = ELEMENTWISE[name][0].backward(residuals, jnp.ones_like(y))
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert np.isfinite(np.asarray(y, float)).all()
    assert np.isfinite(np.asarray(dx, float)).all()


def test_known_slopes():
    slopes = {
        (bh.ops.relu, 0.0): 0.0,
        (bh.ops.relu, 2.0): 1.0,
        (bh.ops.leaky_relu, 0.0): 1.0,
        (bh.ops.leaky_relu, -1.0): 0.01,
        (bh.ops.elu, 0.0): 1.0,
        (bh.ops.sigmoid, 0.0): 0.25,
        (bh.ops.tanh, 0.0): 1.0,
        (bh.ops.silu, 0.0): 0.5,
        (bh.ops.gelu, 0.0): 0.5,
        (bh.ops.softplus, 0.0): 0.5,
    }
    for (op, x), slope in slopes.items():
        assert float(jax.grad(op)(x)) == pytest.approx(slope), op.name


def test_relu_passes_the_error_of_what_was_kept():
    dx = bh.ops.relu.backward(jnp.asarray([0.0, 3.0, 0.0]), jnp.asarray([jnp.nan, 7.0, 5.0]))
    assert dx.tolist() == [0, 7, 0]


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax_gives_probabilities_and_errors_that_sum_to_zero(x64, axis):
    x = normal(0, 3, 4) * 10
    y, residuals = bh.ops.softmax.forward(x, axis=axis)
    dx = bh.ops.softmax.backward(residuals, normal(1, 3, 4), axis=axis)
    assert_close(y.sum(axis), jnp.ones_like(y.sum(axis)))
    assert jnp.max(jnp.abs(dx.sum(axis))) < 1e-15
    assert_close(bh.ops.softmax(x + 1e3, axis=axis), y, 1e-9)


def test_softmax_of_extremes_is_finite():
    x = jnp.asarray([[1e4, -1e4, 0.0], [-jnp.inf, 0.0, 0.0]])
    for dtype in (jnp.float32, jnp.bfloat16):
        y, residuals = bh.ops.softmax.forward(x.astype(dtype))
        assert y.astype(float).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
        assert jnp.isfinite(bh.ops.softmax.backward(residuals, jnp.ones_like(y))).all()


def test_what_is_no_input_is_refused(unchecked, nothing_compiles):
    ints, x = jax.ShapeDtypeStruct((2, 3), "int32"), jax.ShapeDtypeStruct((2, 3), "float32")
    with nothing_compiles():
        for op, _ in ELEMENTWISE.values():
            with pytest.raises(
                TypeError, match=rf"{op.name} needs floating-point input, got int32"
            ):
                jax.eval_shape(op, ints)
        with pytest.raises(ValueError, match=r"softmax over axis 2 needs .*got shape \(2, 3\)"):
            jax.eval_shape(lambda x: bh.ops.softmax(x, axis=2), x)
