"""The gradient is clipped whole, layer by layer, or example by example."""

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh
from backhand.training.clip import by_norm, layers_of, norm
from tests.support import assert_close, normal
from tests.training.common import OBJECTIVE, batch, begin, gradient, one_step, updates


@pytest.mark.parametrize("largest", [0.01, 100.0])
def test_the_whole_gradient_is_clipped_as_optax_does_it(x64, largest):
    before, state, metrics = one_step(clip_norm=largest, accumulate=3)
    plain = gradient(before)
    clipped, _ = optax.clip_by_global_norm(largest).update(plain, optax.EmptyState())
    assert_close(updates(before, state), clipped, 1e-9)
    assert_close(metrics["gradient_norm"], optax.tree.norm(plain))


def test_the_norm_of_a_low_dtype_is_that_of_its_numbers():
    grads = {"w": jnp.full(4, 300, jnp.float16)}
    assert float(norm(grads)) == 600
    assert by_norm(grads, 6.0)["w"].tolist() == [3, 3, 3, 3]


def test_each_layer_is_clipped_on_its_own(x64):
    before, state, _ = one_step(clip_layer_norm=0.1)
    plain = gradient(before)
    clip = optax.clip_by_global_norm(0.1)
    truth = {name: clip.update(layer, optax.EmptyState())[0] for name, layer in plain.items()}
    assert_close(updates(before, state), truth, 1e-9)
    assert {name: bool(optax.tree.norm(plain[name]) > 0.1) for name in plain} == {
        "hidden": True,
        "act": False,
        "out": True,
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_example_is_clipped_on_its_own(x64, accumulate):
    before, state, metrics = one_step(clip_example_norm=1.5, accumulate=accumulate)

    def total(params, example):
        one = jax.tree.map(lambda leaf: leaf[None], example)
        return OBJECTIVE.forward(params, one)[0].total

    each = jax.vmap(jax.grad(total), (None, 0))(before, batch())
    clipped, count = optax.per_example_global_norm_clip(each, 1.5)
    weight = jnp.sum(batch()["weights"])
    assert_close(updates(before, state), jax.tree.map(lambda g: g / weight, clipped), 1e-9)
    share = float(count) / int(jnp.sum(batch()["weights"] > 0))
    assert 0 < share < 1
    assert abs(float(metrics["clipped"]) - share) < 1e-6


def test_clipping_by_example_then_by_norm_are_both_done(x64):
    before, state, _ = one_step(clip_example_norm=0.5, clip_norm=0.01)
    assert abs(float(optax.tree.norm(updates(before, state))) - 0.01) < 1e-9


# What a layer is ----------------------------------------------------------------------------------

BLOCK = bh.skip(bh.chain(bh.dense(4), bh.tanh()))


def test_a_repeated_layer_is_clipped_as_an_unrolled_one(x64):
    cross_entropy = bh.losses.softmax_cross_entropy
    repeated = bh.objective(bh.chain(bh.repeat(BLOCK, 3), bh.dense(3)), cross_entropy)
    unrolled = bh.objective(bh.chain(BLOCK, BLOCK, BLOCK, bh.dense(3)), cross_entropy)
    state = begin(optax.sgd(1.0), repeated)
    stack, out = state.params
    depths = [jax.tree.map(lambda leaf, k=k: leaf[k], stack) for k in range(3)]
    apart = bh.train_state((*depths, out), optax.sgd(1.0))
    before, after, _ = one_step(objective=repeated, state=state, clip_layer_norm=0.1)
    ours = updates(before, after)
    before, after, _ = one_step(objective=unrolled, state=apart, clip_layer_norm=0.1)
    *each, out = updates(before, after)
    assert_close(ours, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), out))
    norms = [float(optax.tree.norm(layer)) for layer in each]
    assert norms == pytest.approx([0.1] * 3)


def scale():
    """A layer whose parameter stands by itself."""
    return bh.layer(
        "scale",
        lambda key, x: jnp.ones(x.shape[-1]),
        lambda params, x: (x * bh.arrays.last_axis(params, x), x),
        lambda params, x, dy: (bh.Total(x * dy), dy * bh.arrays.last_axis(params, dy)),
    )


def depths(model, x):
    """The shape of each layer's depth, by the path of its parameters."""
    objective = bh.objective(model, bh.losses.mean_squared_error)
    y = jax.eval_shape(lambda: model(model.init(jax.random.key(0), x), x))
    data = {"inputs": x, "targets": jnp.zeros(y.shape)}
    params = objective.init(jax.random.key(0), data)
    layers = layers_of(objective, params, data, None)
    found = jax.tree_util.tree_leaves_with_path(layers)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in found
    }


def test_a_layer_is_what_owns_parameters():
    attention = bh.skip(bh.multi_head_attention(2))
    model = bh.chain(attend=attention, a=scale(), b=scale(), act=bh.relu(), out=bh.dense(4))
    assert depths(model, normal(0, 2, 3, 4)) == {"attend": (), "a": (), "b": (), "out": ()}
    twice = bh.repeat(bh.repeat(bh.chain(up=bh.dense(4), down=bh.dense(4)), 2), 3)
    assert depths(twice, normal(0, 2, 4)) == {"up": (3, 2), "down": (3, 2)}
    tied = bh.share(bh.chain(a=bh.dense(4), b=bh.dense(4)), {"b/w": "a/w"})
    assert depths(tied, normal(0, 2, 4)) == {"a": (), "b": ()}
