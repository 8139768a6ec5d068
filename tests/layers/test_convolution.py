"""Convolutional layers: what they begin with, norms of examples, and what they refuse."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradient_and_norms, initial, normal


@pytest.mark.parametrize(
    "layer",
    [bh.conv(64, 3), bh.depthwise_conv(3, multiplier=2), bh.conv_transpose(64, 3)],
    ids=repr,
)
def test_an_output_begins_about_as_large_as_its_input(layer):
    """Each output of a convolution sums over its window: 1 / fan-in is the variance of w."""
    x = normal(0, 2, 12, 12, 64)
    params = layer.init(jax.random.key(0), x)
    assert not params["b"].any()
    assert 0.8 < float(jnp.std(layer(params, x)[:, 2:-2, 2:-2])) < 1.2


def test_the_bias_is_added_at_every_place_and_blamed_for_all():
    layer, x = bh.conv(3, 3, stride=2), normal(0, 2, 6, 6, 2)
    params = {**layer.init(jax.random.key(0), x), "b": jnp.arange(3.0)}
    y, residuals = layer.forward(params, x)
    without = bh.conv(3, 3, stride=2, bias=False)({"w": params["w"]}, x)
    assert_close(y, without + jnp.arange(3.0)[None, None, None], 1e-6)
    assert layer.backward(params, residuals, jnp.ones_like(y))[0]["b"].tolist() == [18, 18, 18]


def test_a_kernel_of_one_number_has_the_rank_of_the_input():
    shapes = [(2, 5, 3), (2, 5, 5, 3), (2, 5, 5, 5, 3)]
    params = [bh.conv(4, 3).init(jax.random.key(0), jnp.ones(shape)) for shape in shapes]
    assert [p["w"].shape for p in params] == [(3, 3, 4), (3, 3, 3, 4), (3, 3, 3, 3, 4)]


def test_norms_of_examples_come_with_the_gradient(x64):
    model = bh.chain(
        bh.conv(4, 3, stride=2),
        bh.tanh(),
        bh.depthwise_conv(3, multiplier=2),
        bh.conv(4, 1, groups=2, bias=False),
        bh.conv_transpose(2, 4, stride=2),
    )
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 3, 6, 6, 3), "targets": normal(1, 3, 6, 6, 2)}
    assert_gradient_and_norms(objective, initial(model, batch["inputs"]), batch)


def test_norms_of_examples_in_a_repeated_block(x64):
    model = bh.repeat(bh.skip(bh.chain(bh.conv(2, 3), bh.tanh())), 2)
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 3, 5, 2), "targets": normal(1, 3, 5, 2)}
    assert_gradient_and_norms(objective, initial(model, batch["inputs"]), batch, depth=1)


def test_micro_batches_give_the_gradient_of_the_whole_batch(x64):
    model = bh.chain(bh.conv(3, 3), bh.relu(), bh.conv_transpose(2, 3))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 6, 5, 2), "targets": normal(1, 6, 5, 2)}
    params = initial(model, batch["inputs"])
    split = jax.jit(bh.accumulate(bh.value_and_grad(objective), 3))(params, batch)
    whole = jax.jit(bh.value_and_grad(objective))(params, batch)
    assert_close(split[1], whole[1])


def test_what_does_not_fit_is_refused(unchecked):
    key = jax.random.key(0)
    for make in (bh.conv, bh.conv_transpose):
        with pytest.raises(ValueError, match="needs at least 1 feature, got 0"):
            make(0, 3)
        with pytest.raises(
            ValueError, match=r"kernel_size as one integer or 2, .* got \(3, 3, 3\)"
        ):
            make(4, (3, 3, 3)).init(key, jnp.ones((2, 5, 5, 3)))
        with pytest.raises(ValueError, match=r"1, 2 or 3 spatial axes, got \(5, 3\)"):
            make(4, 3).init(key, jnp.ones((5, 3)))
        with pytest.raises(TypeError, match="needs floating-point input, got int32"):
            make(4, 3).init(key, jnp.ones((2, 5, 3), "int32"))
    with pytest.raises(
        ValueError, match=r"conv needs channels divisible by groups = 2, got x \(2, 5"
    ):
        bh.conv(4, 3, groups=2).init(key, jnp.ones((2, 5, 3)))
    with pytest.raises(ValueError, match="features divisible by groups = 3, got 4"):
        bh.conv_transpose(4, 3, groups=3)
    with pytest.raises(ValueError, match="multiplier of at least 1, got 0"):
        bh.depthwise_conv(3, multiplier=0)
    for layer, message in (
        (bh.conv(7, 3, groups=2), "channels divisible by groups = 2, got 8 in x .* and 7 at the"),
        (bh.conv(7, 5, padding="VALID"), "convolution needs"),
        (bh.depthwise_conv(5, padding="VALID"), "convolution needs"),
        (bh.conv_transpose(6, 3, groups=3), "transposed_convolution needs"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.init(key, jnp.ones((2, 4, 4, 8)))
    layer = bh.conv(4, 3)
    params = layer.init(key, jnp.ones((2, 5, 3)))
    with pytest.raises(ValueError, match="convolution needs weights with 2 axes for the taps"):
        layer(params, jnp.ones((2, 5, 5, 3)))
