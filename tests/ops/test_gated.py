"""Gated units: who is blamed behind a gate, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from backhand.ops.gated import ACTIVATIONS
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal

NAMED = {"sigmoid": "glu", "silu": "swiglu", "gelu": "geglu"}


@pytest.mark.parametrize("activation", NAMED)
def test_a_named_unit_is_the_gate_of_its_activation(activation, x64):
    gate, value, dy = (normal(i, 3, 4) for i in range(3))
    sides = []
    for op in (getattr(bh.ops, NAMED[activation]), bh.ops.gated.bind(activation=activation)):
        y, residuals = op.forward(gate, value)
        sides.append((y, op.backward(residuals, dy)))
    assert_close(*sides)


def test_a_shut_gate_shields_the_value_and_a_zero_value_the_gate():
    op = bh.ops.gated.bind(activation="relu")
    gate, value = jnp.array([-1.0, 2.0, 2.0]), jnp.array([5.0, 5.0, 0.0])
    y, residuals = op.forward(gate, value)
    dgate, dvalue = op.backward(residuals, jnp.ones(3))
    assert y.tolist() == [0.0, 10.0, 0.0]
    assert dgate.tolist() == [0.0, 5.0, 0.0] and dvalue.tolist() == [0.0, 2.0, 2.0]


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([(), (1,), (0, 2), (3, 4), (2, 3, 1)]),
    st.floats(-20, 20),
    st.integers(0, 1000),
)
def test_any_shape_and_activation_has_the_gradient_of_autodiff(activation, shape, scale, seed):
    random = np.random.default_rng(seed)
    gate, value = scale * random.standard_normal(shape), random.standard_normal(shape)
    arrays = np.asarray(gate), np.asarray(value)
    assert_is_its_reference(bh.ops.gated, arrays, seed, floor=1e-12, activation=activation)


def test_what_is_no_gated_unit_is_refused(unchecked, nothing_compiles):
    x, other = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((2, 4), "float32")
    ints = jax.ShapeDtypeStruct((2, 3), "int32")
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"of one shape, got \(2, 3\) and \(2, 4\); halves"):
            jax.eval_shape(bh.ops.gated, x, other)
        with pytest.raises(TypeError, match="gated needs floating-point value, got int32"):
            jax.eval_shape(bh.ops.swiglu, x, ints)
        with pytest.raises(ValueError, match=r"one of 'elu', .* got 'swish'"):
            jax.eval_shape(bh.ops.gated.bind(activation="swish"), x, x)
        with pytest.raises(TypeError, match=r"an activation by name, or an op .* got <.*tanh"):
            jax.eval_shape(bh.ops.gated.bind(activation=jnp.tanh), x, x)
