"""Inputs of several parts: blocks of an encoder and a decoder, what they store, what is refused."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    assert_gradients_agree,
    initial,
    labels,
    normal,
    residual_bytes,
    temporary_bytes,
)


def attention(mask, **settings):
    return bh.rename(bh.multi_head_attention(2, **settings), mask=mask)


def feed_forward():
    return bh.skip(bh.chain(bh.rms_norm(), bh.mlp(6)))


def encoder_block():
    return bh.chain(bh.skip(bh.chain(bh.rms_norm(), attention("source"))), feed_forward())


def decoder_block():
    return bh.chain(
        bh.on("x", bh.skip(bh.chain(bh.rms_norm(), attention("target", causal=True)))),
        bh.skip(bh.chain(bh.on("x", bh.rms_norm()), attention("source")), on="x"),
        bh.on("x", feed_forward()),
    )


def encoder_decoder(around=lambda inner: inner):
    return bh.chain(
        bh.on("context", bh.chain(bh.embedding(9, 4), bh.repeat(around(encoder_block()), 2))),
        bh.on("x", bh.embedding(7, 4)),
        bh.repeat(around(decoder_block()), 2),
        bh.pick("x"),
        bh.dense(7),
    )


def translation_batch():
    return {
        "inputs": {"x": labels(0, 7, 3, 4), "context": labels(1, 9, 3, 5)},
        "targets": labels(2, 7, 3, 4),
        "source": jnp.arange(5)[None] < jnp.asarray([5, 2, 3])[:, None],
        "target": jnp.arange(4)[None] < jnp.asarray([1, 4, 3])[:, None],
    }


@pytest.mark.parametrize("around", [lambda inner: inner, bh.checkpoint], ids=["", "checkpoint"])
def test_an_encoder_and_a_decoder_have_the_gradient_of_autodiff(x64, around):
    objective = bh.objective(encoder_decoder(around), bh.losses.softmax_cross_entropy)
    batch = translation_batch()
    params = initial(encoder_decoder(), batch["inputs"])
    assert_gradients_agree(objective, params, batch)


def test_norms_of_examples_come_from_the_same_pass(x64):
    model = bh.chain(bh.skip(attention("source"), on="x"), bh.on("x", bh.dense(2)), bh.pick("x"))
    batch = {
        "inputs": {"x": normal(0, 3, 4, 4), "context": normal(1, 3, 5, 6)},
        "targets": normal(2, 3, 4, 2),
        "source": jnp.arange(5)[None] < jnp.asarray([5, 2, 3])[:, None],
    }
    objective = bh.objective(model, bh.losses.mean_squared_error)
    assert_gradient_and_norms(objective, initial(model, batch["inputs"]), batch)


def test_masks_of_an_encoder_and_a_decoder_are_apart():
    """A source that is masked out, and a target that comes later, have no blame."""
    layer = bh.chain(bh.on("context", bh.skip(attention("source"))), decoder_block(), bh.pick("x"))
    x = {"x": normal(0, 1, 4, 4), "context": normal(1, 1, 5, 4)}
    params = initial(layer, x)
    masks = {"source": jnp.arange(5)[None] < 3, "target": jnp.arange(4)[None] > 0}
    blame = jax.jit(jax.grad(lambda x: layer(params, x, **masks)[0, 2].sum()))(x)
    assert (blame["context"] != 0).any((0, 2)).tolist() == [True, True, True, False, False]
    assert (blame["x"] != 0).any((0, 2)).tolist() == [False, True, True, False]


def test_a_layer_on_one_part_leaves_the_others_as_they_are(x64):
    layer = bh.on("x", bh.dense(3))
    x = {"x": normal(0, 2, 4), "ids": labels(1, 5, 2), "more": (normal(2, 2), normal(3, 2))}
    params = initial(layer, x)
    y = layer.forward(params, x)[0]
    assert y["ids"] is x["ids"] and y["more"] is x["more"]
    assert_close(y["x"], bh.dense(3)(params, x["x"]))
    assert_backward_is_the_gradient(layer, params, x)
    assert repr(layer) == "on(dense)"


def test_a_part_of_a_tuple_goes_by_its_place(x64):
    x = (normal(0, 2, 4), normal(1, 2, 3), labels(2, 5, 2))
    layer = bh.chain(bh.on(1, bh.dense(4)), bh.skip(bh.pick(1), on=0), bh.on(2, bh.embedding(5, 4)))
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x)
    y = layer(params, x)
    assert_close(y[0], x[0] + y[1])
    assert_backward_is_the_gradient(bh.pick(0), (), x)


def test_what_is_added_to_a_part_may_have_more_beside_it(x64):
    experts = bh.chain(bh.pick("x"), bh.mixture_of_experts(2, 4))
    x = {"x": normal(0, 2, 3, 4), "context": normal(1, 2, 5, 4)}
    layer = bh.skip(experts, on="x")
    params = initial(layer, x)
    (y, balance), _ = layer.forward(params, x)
    assert y["context"] is x["context"] and balance.shape == (2,)
    assert_backward_is_the_gradient(layer, params, x)


# What is stored -----------------------------------------------------------------------------------


def test_a_context_is_stored_once_whatever_the_depth():
    x = {"x": jnp.zeros((2, 3, 4)), "context": jnp.zeros((2, 64, 4))}

    def stored(depth):
        layer = bh.repeat(decoder_block(), depth)
        return residual_bytes(layer, jax.eval_shape(layer.init, jax.random.key(0), x), x)

    one = stored(1) - x["context"].nbytes
    assert stored(4) - stored(1) == 3 * one


def test_the_compiled_step_keeps_a_context_once_and_adds_its_errors_up():
    """What a checkpointed block adds to the scratch memory is its x, an eighth of the context."""
    inputs = {"x": jnp.zeros((4, 8, 16)), "context": jnp.zeros((4, 64, 16))}
    batch = {"inputs": inputs, "targets": inputs["x"]}

    def measured(depth):
        model = bh.chain(
            bh.on("context", bh.dense(16)),
            bh.repeat(bh.checkpoint(decoder_block()), depth),
            bh.pick("x"),
        )
        objective = bh.objective(model, bh.losses.mean_squared_error)
        params = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
        return temporary_bytes(bh.value_and_grad(objective), params, batch)

    per_block = (measured(20) - measured(4)) / 16
    assert per_block < 1.2 * inputs["x"].nbytes, per_block / inputs["x"].nbytes


# Refusals -----------------------------------------------------------------------------------------


def test_parts_that_are_not_there_are_refused(unchecked, nothing_compiles):
    key, array = jax.random.key(0), jax.ShapeDtypeStruct((2, 3, 4), "float32")
    both = {"x": array, "context": array}
    attend = bh.multi_head_attention(2)
    with nothing_compiles():
        for layer, x, error, message in (
            (bh.on("y", bh.dense(2)), both, ValueError, r"no part 'y', only \['context', 'x'\]"),
            (bh.on(2, bh.dense(2)), (array,) * 2, ValueError, r"no part 2, only \[0, 1\]"),
            (bh.on("x", bh.dense(2)), array, TypeError, "'x' of a dict or a tuple .* got float32"),
            (bh.pick("x"), array, TypeError, "pick takes 'x' of a dict or a tuple of inputs"),
            (
                bh.skip(attend),
                both,
                ValueError,
                "say which part it is added to",
            ),
            (
                bh.skip(bh.chain(bh.pick("x"), bh.dense(3)), on="x"),
                both,
                ValueError,
                "the part 'x'",
            ),
            (
                bh.repeat(attend, 2),
                both,
                ValueError,
                "the output of multi_head_attention must have",
            ),
        ):
            with pytest.raises(error, match=message):
                jax.eval_shape(bh.chain(layer).init, key, x)


def test_a_layer_of_one_array_says_so(unchecked, nothing_compiles):
    key, array = jax.random.key(0), jax.ShapeDtypeStruct((2, 3, 4), "float32")
    makers = (bh.dense(2), bh.layer_norm(), bh.mlp(4), bh.relu(), bh.conv(2, 3))
    with nothing_compiles():
        for layer in makers:
            with pytest.raises(TypeError, match=r"one array, got a dict of 'context', 'x'; .*on\("):
                jax.eval_shape(bh.chain(layer).init, key, {"x": array, "context": array})
