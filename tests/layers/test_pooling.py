"""Pooling layers are the ops that they are named after."""

import jax
import pytest

import backhand as bh
from tests.support import assert_backward_is_the_gradient, assert_identical, normal

LAYERS = {
    "max_pool": (bh.max_pool((2, 2), stride=(1, 2)), {"window": (2, 2), "stride": (1, 2)}),
    "average_pool": (
        bh.average_pool((3, 3), padding="SAME", count_padding=True),
        {"window": (3, 3), "padding": "SAME", "count_padding": True},
    ),
    "global_average_pool": (bh.global_average_pool(), {}),
    "global_max_pool": (bh.global_max_pool(), {}),
    "adaptive_average_pool": (bh.adaptive_average_pool((2, 3)), {"sizes": (2, 3)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_op_and_has_no_parameters(x64, name):
    layer, settings = LAYERS[name]
    x = normal(0, 2, 5, 4, 3)
    assert layer.init(jax.random.key(0), x) == () and layer.uses == frozenset()
    assert_identical(layer((), x), getattr(bh.ops, name)(x, **settings))
    assert_backward_is_the_gradient(layer, (), x)


def test_a_window_that_does_not_fit_is_refused_when_the_model_is_initialised(nothing_compiles):
    model = bh.chain(bh.max_pool((2, 2)), bh.max_pool((4, 4)), bh.dense(3))
    x = jax.ShapeDtypeStruct((2, 6, 6, 3), "float32")
    key = jax.random.key(0)
    with nothing_compiles(), pytest.raises(ValueError, match="max_pool needs a window within"):
        jax.eval_shape(lambda key: model.init(key, x), key)
