"""The layer of experts: in a stack, with its balance in the loss, exact over micro-batches."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradient_and_norms, initial, normal


def model():
    """Two blocks of experts, whose balances add up beside the logits."""
    experts = bh.chain(bh.layer_norm(), bh.mixture_of_experts(3, 5, 2, 0.8, activation="silu"))
    return bh.chain(bh.skip(experts), bh.tally(bh.skip(experts)), bh.tally(bh.dense(2)))


def problem():
    loss = bh.losses.with_balance(bh.losses.mean_squared_error, 0.1)
    objective = bh.objective(model(), loss)
    batch = {"inputs": normal(0, 4, 6, 4), "targets": normal(1, 4, 6, 2)}
    return objective, initial(model(), batch["inputs"]), batch


def test_gradient_and_norms_are_those_of_autodiff(x64):
    layer = bh.chain(bh.mixture_of_experts(3, 5, 2, 0.8), bh.tally(bh.dense(2)))
    loss = bh.losses.with_balance(bh.losses.mean_squared_error, 0.1)
    batch = {"inputs": normal(0, 3, 6, 4), "targets": normal(1, 3, 6, 2)}
    params = initial(layer, batch["inputs"])
    # Of each expert there are the norms of all examples: as of the steps of a repeat.
    depth = ({"router": 0, "w_in": 1, "w_out": 1}, 0)
    assert_gradient_and_norms(bh.objective(layer, loss), params, batch, depth=depth)


def test_accumulation_is_exact_and_the_balance_is_learned(x64):
    objective, params, batch = problem()
    whole = jax.jit(bh.value_and_grad(objective))(params, batch)
    automatic = jax.jit(jax.value_and_grad(lambda p: objective(p, batch)))(params)
    assert_close(whole, automatic)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
    each = [jax.jit(bh.value_and_grad(objective))(params, part) for part in parts]
    assert_close(jax.tree.map(lambda *g: sum(g) / 4, *each), whole)
    grads = whole[1]
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_the_balance_alone_pushes_the_router(x64):
    layer, x = bh.mixture_of_experts(3, 5, 1, None), normal(0, 2, 6, 4)
    params = initial(layer, x)
    (y, balance), residuals = layer.forward(params, x)
    grads, dx = layer.backward(params, residuals, (jnp.zeros_like(y), jnp.ones_like(balance)))
    assert grads["router"].any() and dx.any()
    assert not grads["w_in"].any() and not grads["w_out"].any()
    less = {**params, "router": params["router"] - 1e-3 * grads["router"]}
    assert layer(less, x)[1].sum() < balance.sum()


def test_it_keeps_the_dtypes(unchecked):
    layer, x = bh.mixture_of_experts(3, 5, gated=True), normal(0, 2, 6, 4, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    y, residuals = layer.forward(params, x)
    grads, dx = layer.backward(params, residuals, y)
    assert y[0].dtype == dx.dtype == jnp.bfloat16 and y[1].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}


def test_what_cannot_be_is_refused(nothing_compiles):
    with nothing_compiles():
        for settings, message in {
            (0, 4): "at least 1 for experts, got 0",
            (4, 0): "at least 1 for hidden, got 0",
            (2, 4, 3): "top_k from 1 to its 2 experts, got 3",
            (4, 4, 2, -1.0): "a positive capacity_factor, or None to drop nothing, got -1.0",
        }.items():
            with pytest.raises(ValueError, match=message):
                bh.mixture_of_experts(*settings)
        shape = jax.ShapeDtypeStruct((6, 4), "float32")
        with pytest.raises(ValueError, match=r"x of shape \(B, T, D\), got \(6, 4\)"):
            jax.eval_shape(bh.mixture_of_experts(4, 4).init, jax.random.key(0), shape)
