"""Feed-forward blocks: parameters, gradient and norms, and what they save."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradient_and_norms, initial, normal, residual_bytes


@pytest.mark.parametrize("activation", ["softplus", "gelu_tanh", bh.ops.elu.bind(alpha=0.5)])
def test_an_mlp_is_the_chain_that_it_stands_for(activation, x64):
    layer, x = bh.mlp(6, 3, activation=activation), normal(0, 2, 5, 4)
    params = initial(layer, x)
    acts = {"softplus": bh.softplus(), "gelu_tanh": bh.gelu(approximate=True)}
    act = acts[activation] if isinstance(activation, str) else bh.elu(alpha=0.5)
    chained = bh.chain(hidden=bh.dense(6), act=act, out=bh.dense(3))
    results = []
    for own, given in ((layer, params), (chained, {**params, "act": ()})):
        y, residuals = own.forward(given, x)
        grads, dx = own.backward(given, residuals, jnp.cos(y))
        results.append((y, {name: grads[name] for name in ("hidden", "out")}, dx))
    assert_close(*results)


def test_every_activation_goes_by_its_name():
    for op in vars(bh.ops.activations).values():
        if isinstance(op, bh.Op) and op.name != "softmax":
            assert bh.mlp(6, activation=op.name).name == "mlp"


@pytest.mark.parametrize("layer", [bh.mlp(6, activation="tanh"), bh.gated_mlp(6)], ids=repr)
def test_gradient_and_norms_of_examples(layer, x64):
    objective = bh.objective(layer, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 3, 2, 4), "targets": normal(1, 3, 2, 4)}
    assert_gradient_and_norms(objective, initial(layer, batch["inputs"]), batch)


def test_only_what_the_activation_was_of_is_saved():
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    for layer, hidden in ((bh.mlp(16), 16), (bh.gated_mlp(16), 32)):
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert residual_bytes(layer, params, x) == 4 * 3 * (4 + hidden)


def test_it_computes_in_bfloat16_and_learns_in_float32():
    x = normal(0, 2, 4, dtype=jnp.bfloat16)
    for layer in (bh.mlp(6), bh.gated_mlp(6)):
        params = layer.init(jax.random.key(0), x)
        y, residuals = layer.forward(params, x)
        grads, dx = layer.backward(params, residuals, y)
        assert y.dtype == dx.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}


def test_what_is_no_block_is_refused(unchecked, nothing_compiles):
    key = jax.random.key(0)
    with nothing_compiles():
        for name, make in (("mlp", bh.mlp), ("gated_mlp", bh.gated_mlp)):
            with pytest.raises(ValueError, match=f"{name} needs at least 1 for hidden, got 0"):
                make(0)
            with pytest.raises(ValueError, match=f"{name} needs at least 1 for features, got 0"):
                make(4, 0)
            with pytest.raises(ValueError, match=f"{name} needs an activation .* got 'swish'"):
                make(4, activation="swish")
            with pytest.raises(TypeError, match=f"{name} needs floating-point input, got int32"):
                jax.eval_shape(make(4).init, key, jax.ShapeDtypeStruct((2, 3), "int32"))
            with pytest.raises(ValueError, match=rf"{name} needs x of shape \(..., D\)"):
                jax.eval_shape(make(4).init, key, jax.ShapeDtypeStruct((), "float32"))
