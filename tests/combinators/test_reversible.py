"""The reversible stack: its gradient, its keys, what it stores, and how far it drifts."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_gradient_and_norms,
    initial,
    normal,
    residual_bytes,
    temporary_bytes,
)


def branch(*more, hidden=6):
    return bh.chain(bh.layer_norm(), bh.mlp(hidden), *more)


def test_it_is_a_residual_stack_of_two_halves_and_its_backward_the_gradient(x64):
    layer, x = bh.reversible(branch(), bh.gated_mlp(5), 3), normal(0, 2, 3, 8)
    params = initial(layer, x)
    x1, x2 = jnp.split(x, 2, -1)
    for step in range(3):
        own = jax.tree.map(lambda leaf, step=step: leaf[step], params)
        x1 = x1 + branch()(own["f"], x2)
        x2 = x2 + bh.gated_mlp(5)(own["g"], x1)
    np.testing.assert_allclose(layer(params, x), jnp.concatenate([x1, x2], -1), rtol=1e-12)
    assert_backward_is_the_gradient(layer, params, x)


def test_norms_of_examples_come_from_the_same_pass(x64):
    layer = bh.reversible(branch(), branch(), 2)
    batch = {"inputs": normal(0, 3, 2, 8), "targets": normal(1, 3, 2, 8)}
    objective = bh.objective(layer, bh.losses.mean_squared_error)
    params = initial(layer, batch["inputs"])
    assert_gradient_and_norms(objective, params, batch, depth=1)


def test_backward_draws_the_masks_of_forward_again(x64):
    layer, x = bh.reversible(branch(bh.dropout(0.5)), bh.dropout(0.5), 3), normal(0, 2, 8)
    params, side = initial(layer, x), {"training": True, "key": jax.random.key(3)}
    assert_backward_is_the_gradient(layer, params, x, **side)
    assert not np.array_equal(layer(params, x, **side), layer(params, x, training=False))


def test_neither_residuals_nor_scratch_memory_grow_with_depth():
    x = jnp.zeros((256, 32))
    batch = {"inputs": x, "targets": x}

    def measured(depth, automatic=False):
        layer = bh.reversible(branch(hidden=32), branch(hidden=32), depth)
        objective = bh.objective(layer, bh.losses.mean_squared_error)
        params = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
        assert residual_bytes(layer, params, x) == 2 * x.nbytes  # and what rounding took
        run = jax.value_and_grad(lambda p, b: objective(p, b))
        return temporary_bytes(run if automatic else bh.value_and_grad(objective), params, batch)

    assert measured(16) - measured(4) < x.nbytes
    assert measured(16, automatic=True) - measured(4, automatic=True) > 12 * x.nbytes


def drift(depth, dtype, layer=None):
    """How far the gradient is from the float64 truth, as a share of its norm.

    By hand, and by autodiff, which stores every activation. What the docstring of `reversible` says
    is printed by

        python -c "from tests.combinators.test_reversible import *; print(drift(8, 'bfloat16'))"
    """
    layer = bh.reversible(*([layer or branch(hidden=16)] * 2), depth)
    x, dy = (normal(i, 16, 32, dtype=dtype) for i in range(2))
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def by_hand(params, x, dy):
        return layer.backward(params, layer.forward(params, x)[1], dy)

    def stored(params, x, dy):
        return jax.vjp(layer, params, x)[1](dy)

    both = [jax.jit(f)(params, x, dy) for f in (by_hand, stored)]
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x, dy))
        truth = flat(jax.jit(stored)(*exact))
    return [np.linalg.norm(flat(own) - truth) / np.linalg.norm(truth) for own in both]


def flat(tree):
    return np.concatenate([np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(tree)])


def test_rebuilding_drifts_no_further_than_storing_everything(monkeypatch):
    ours, stored = drift(16, "bfloat16")
    assert 0.003 < ours < 0.03 and ours < 1.1 * stored
    ours32, stored32 = drift(32, "float32")
    assert ours32 < 1e-6 and ours32 < 1.2 * stored32
    growing, stored32 = drift(3, "float32", bh.gated_mlp(16))
    assert growing < 3 * stored32
    module = sys.modules["backhand.combinators.reversible"]  # the package has the function there
    monkeypatch.setattr(module, "_plus", lambda half, z: half._replace(near=half.near + z))
    assert drift(32, "float32")[0] > 3 * ours32


def test_infinity_stays_infinity():
    """What rounding takes from an infinite sum is nothing."""
    x = jnp.full((1, 2), jnp.inf)
    layer = bh.reversible(bh.tanh(), bh.tanh(), 2)
    assert np.all(np.isposinf(layer(initial(layer, x), x)))


def test_what_cannot_be_halved_or_rebuilt_is_refused(unchecked, nothing_compiles):
    key, layer = jax.random.key(0), bh.reversible(branch(), branch(), 2)
    with nothing_compiles():
        for shape in ((2, 5), (2, 0), ()):
            with pytest.raises(ValueError, match="an even number of features to halve, got x"):
                jax.eval_shape(layer.init, key, jax.ShapeDtypeStruct(shape, "float32"))
        with pytest.raises(TypeError, match="reversible needs floating-point input, got int32"):
            jax.eval_shape(layer.init, key, jax.ShapeDtypeStruct((2, 4), "int32"))
        with pytest.raises(TypeError, match="reversible needs one array, got a tuple of 2"):
            pair = (jax.ShapeDtypeStruct((2, 4), "float32"),) * 2
            jax.eval_shape(layer.init, key, pair)
        with pytest.raises(ValueError, match="the output of g must have the shape and dtype"):
            wrong = bh.reversible(branch(), bh.dense(3), 2)
            jax.eval_shape(wrong.init, key, jax.ShapeDtypeStruct((2, 8), "float32"))
        with pytest.raises(ValueError, match="a depth of at least 1, got 0"):
            bh.reversible(branch(), branch(), 0)
        with pytest.raises(TypeError, match=r"reversible takes layers, got .* at 'g'"):
            bh.reversible(branch(), bh.relu, 2)
