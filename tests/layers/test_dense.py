"""The dense layer: its parameters, and what its rule leaves unsummed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import backhand as bh
from tests.support import assert_close, normal


def test_parameters_have_their_shapes_and_scale():
    params = bh.dense(1000).init(jax.random.key(0), jax.ShapeDtypeStruct((5, 3, 64), "bfloat16"))
    assert (params["w"].shape, params["b"].shape) == ((64, 1000), (1000,))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert float(jnp.std(params["w"])) == pytest.approx(1 / 8, rel=0.05)
    assert not params["b"].any()
    assert list(bh.dense(3, bias=False).init(jax.random.key(0), jnp.ones((2, 4)))) == ["w"]
    ones = bh.dense(3, initializer=jax.nn.initializers.ones)
    assert (ones.init(jax.random.key(0), jnp.ones((2, 4)))["w"] == 1).all()
    other = bh.dense(1000).init(jax.random.key(1), jnp.ones((1, 64)))
    assert not np.array_equal(other["w"], params["w"])


def test_float64_inputs_make_float64_parameters(x64):
    params = bh.dense(3).init(jax.random.key(0), jnp.ones((2, 4)))
    assert params["w"].dtype == jnp.float64


def test_the_rule_leaves_its_factors_and_the_visit_sums_them(x64):
    layer, x, dy = bh.dense(3), normal(0, 5, 4), normal(1, 5, 3)
    params = {"w": normal(2, 4, 3), "b": normal(3, 3)}
    y, residuals = layer.forward(params, x)
    assert_close(y, x @ params["w"] + params["b"][None])
    factors, _ = layer.backward(params, residuals, dy, lambda v: (v.contributions, v.dx))
    assert (type(factors["w"]), type(factors["b"])) == (bh.Outer, bh.Total)
    grads, dx = layer.backward(params, residuals, dy)
    assert_close(grads, {"w": x.T @ dy, "b": dy.sum(0)})
    assert_close(dx, dy @ params["w"].T)


def test_what_is_no_dense_layer_is_refused(unchecked, nothing_compiles):
    key, shape = jax.random.key(0), jax.ShapeDtypeStruct
    with nothing_compiles():
        with pytest.raises(ValueError, match="dense needs at least 1 feature, got 0"):
            bh.dense(0)
        with pytest.raises(ValueError, match=r"dense needs x of shape .* got a scalar"):
            jax.eval_shape(bh.dense(3).init, key, shape((), "float32"))
        with pytest.raises(TypeError, match=r"got int32 of shape .*or embed it if it holds ids"):
            jax.eval_shape(bh.dense(3).init, key, shape((2, 3), "int32"))


def test_the_signature_of_a_layer_made_again_is_checked_again():
    """The check is made once for all closures of one signature."""
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="checking the parameters of backhand"):
            bh.dense(3).forward({}, jnp.zeros((2, 4), jnp.int32))
