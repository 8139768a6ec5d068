"""Pooling layers are the ops that they are named after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_identical,
    normal,
)

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
    assert layer.init(jax.random.key(0), x) == ()
    assert layer.uses == ({"mask", "lengths"} if name.startswith("global") else frozenset())
    assert_identical(layer((), x), getattr(bh.ops, name)(x, **settings))
    assert_backward_is_the_gradient(layer, (), x)


@pytest.mark.parametrize("make", [bh.global_average_pool, bh.global_max_pool])
def test_padding_neither_counts_nor_has_an_error(x64, make):
    """By lengths and mask together; the last sequence has nothing in it."""
    layer, lengths = make(), jnp.array([3, 2, 0])
    mask = jnp.array([[True, False, True, True]] * 3)
    x = normal(0, 3, 4, 2).at[0, 1].set(jnp.nan).at[1, 2:].set(jnp.inf)
    side = {"mask": mask, "lengths": lengths}
    y, residuals = layer.forward((), x, **side)
    seen = [x[0, jnp.array([0, 2])], x[1, :1], jnp.zeros((1, 2))]
    reduce = jnp.mean if make is bh.global_average_pool else jnp.max
    assert_close(y, jnp.stack([reduce(own, 0) for own in seen]))
    _, dx = layer.backward((), residuals, jnp.ones_like(y), **side)
    assert_close(dx.sum(1), jnp.array([[1.0] * 2, [1.0] * 2, [0.0] * 2]))
    there = mask & (jnp.arange(4)[None] < lengths[:, None])
    assert not np.any(dx[~there])


LENGTHS = np.array([1, 2])


def test_masks_and_lengths_that_do_not_fit_are_refused(unchecked, nothing_compiles):
    x, layer = jax.ShapeDtypeStruct((2, 4, 3), "float32"), bh.global_max_pool()
    with nothing_compiles():
        for given, error, message in (
            (
                {"mask": np.ones((2, 3), bool)},
                ValueError,
                r"a mask of the shape of x .*got \(2, 3\)",
            ),
            ({"mask": np.ones((2, 4))}, TypeError, "a boolean mask, got float64"),
            (
                {"mask": np.ones((2, 3), bool), "lengths": LENGTHS},
                ValueError,
                "a mask of the shape",
            ),
            ({"mask": np.ones((2, 4)), "lengths": LENGTHS}, TypeError, "a boolean mask, got float"),
            ({"lengths": np.array([5, 1])}, ValueError, "lengths"),
            ({"lengths": np.array([1.0, 2.0])}, TypeError, "integer lengths"),
        ):
            with pytest.raises(error, match=f"global_max_pool needs {message}"):
                jax.eval_shape(lambda x, given=given: layer((), x, **given), x)
        image = jax.ShapeDtypeStruct((2, 4, 4, 3), "float32")
        with pytest.raises(ValueError, match="takes lengths of sequences"):
            jax.eval_shape(lambda x: layer((), x, lengths=np.array([1, 2])), image)


def test_a_window_that_does_not_fit_is_refused_when_the_model_is_initialised(nothing_compiles):
    model = bh.chain(bh.max_pool((2, 2)), bh.max_pool((4, 4)), bh.dense(3))
    x = jax.ShapeDtypeStruct((2, 6, 6, 3), "float32")
    key = jax.random.key(0)
    with nothing_compiles(), pytest.raises(ValueError, match="max_pool needs a window within"):
        jax.eval_shape(lambda key: model.init(key, x), key)
