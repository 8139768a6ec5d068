"""Layers without parameters are the ops that they are named after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, assert_identical, normal

LAYERS = {
    "relu": (bh.relu(), jax.nn.relu),
    "leaky_relu": (bh.leaky_relu(0.2), lambda x: jax.nn.leaky_relu(x, 0.2)),
    "sigmoid": (bh.sigmoid(), jax.nn.sigmoid),
    "tanh": (bh.tanh(), jnp.tanh),
    "gelu": (bh.gelu(), lambda x: jax.nn.gelu(x, approximate=False)),
    "approximate gelu": (bh.gelu(approximate=True), jax.nn.gelu),
    "silu": (bh.silu(), jax.nn.silu),
    "softplus": (bh.softplus(), jax.nn.softplus),
    "elu": (bh.elu(0.5), lambda x: jax.nn.elu(x, 0.5)),
    "softmax": (bh.softmax(axis=1), lambda x: jax.nn.softmax(x, 1)),
    "reshape": (bh.reshape(2, -1), lambda x: x.reshape(3, 2, 6)),
    "flatten": (bh.flatten(), lambda x: x.reshape(3, 12)),
    "cast": (bh.cast(jnp.float32), lambda x: x.astype(jnp.float32)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_function_and_has_no_parameters(x64, name):
    layer, function = LAYERS[name]
    x = normal(0, 3, 4, 3)
    assert layer.init(jax.random.key(0), x) == ()
    assert layer.uses == frozenset()
    assert_close(layer((), x), function(x))


def test_dropout_drops_while_training_alone():
    layer, x, key = bh.dropout(0.5), jnp.ones((8, 64)), jax.random.key(0)
    assert layer((), x, training=False) is x
    assert layer((), x, training=False, key=key) is x
    y, residuals = layer.forward((), x, training=True, key=key)
    assert 0.3 < np.mean(y == 0) < 0.7
    assert jax.tree.leaves(residuals) == []
    collected, dx = layer.backward((), residuals, x, training=True, key=key)
    assert collected == ()
    assert_identical(dx, y)
    assert_identical(layer.backward((), (), x, training=False)[1], x)


def test_dropout_says_what_it_needs(unchecked, nothing_compiles):
    layer, x = bh.dropout(0.5), jax.ShapeDtypeStruct((2, 3), "float32")

    def run(x, **side):
        return jax.eval_shape(lambda x: layer((), x, **side), x)

    with nothing_compiles():
        with pytest.raises(ValueError, match=r"a key while training: pass key=jax\.random\.key\("):
            run(x, training=True)
        with pytest.raises(TypeError, match="needs the side input 'training'"):
            run(x)
        with pytest.raises(TypeError, match="no side input 'trainning'; did you mean 'training'"):
            run(x, trainning=True)
        with pytest.raises(TypeError, match="dropout's training must be True or False, got 'eval'"):
            run(x, training="eval")
