"""Multi-head attention: its parameters, its side inputs, and the blame between tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    initial,
    normal,
)


def by_hand(params, x, context, heads, mask=None):
    """Attention written out, one head and one query at a time, in NumPy."""
    params = jax.tree.map(np.asarray, params)
    q, k, v = (
        np.asarray(z) @ params[name]["w"] + params[name]["b"]
        for z, name in ((x, "query"), (context, "key"), (context, "value"))
    )
    size = q.shape[-1] // heads
    y = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(heads):
            own = np.s_[h * size : (h + 1) * size]
            for t in range(q.shape[1]):
                e = np.exp(k[b, :, own] @ q[b, t, own] / np.sqrt(size))
                e = e if mask is None else e * np.asarray(mask[b])
                y[b, t, own] = e @ v[b, :, own] / e.sum()
    return y @ params["out"]["w"] + params["out"]["b"]


def test_it_is_attention_written_out(x64):
    layer = bh.multi_head_attention(2, bias=True)
    x, context = normal(0, 2, 3, 4), normal(1, 2, 5, 6)
    mask = jnp.asarray([[True, False, True, True, False], [True] * 5])
    params = initial(layer, (x, context))
    y = layer(params, (x, context), mask=mask)
    assert_close(y, jnp.asarray(by_hand(params, x, context, 2, mask)))
    assert_close(layer(params, {"x": x, "context": context}, mask=mask), y)
    own = initial(layer, x)
    assert_close(layer(own, x), jnp.asarray(by_hand(own, x, x, 2)))


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 2, "causal": True, "rotary": 10000.0},
        {"heads": 4, "key_heads": 1, "head_size": 3, "features": 5, "bias": True, "window": 2},
    ],
)
def test_its_backward_is_the_gradient(settings, x64):
    layer = bh.multi_head_attention(**settings)
    x, context = normal(0, 2, 5, 4), normal(1, 2, 3, 6)
    segments, mask = jnp.asarray([[0, 0, 1, 1, 1], [0] * 5]), jnp.asarray([[True] * 3] * 2)
    assert_backward_is_the_gradient(layer, initial(layer, x), x, segments=segments)
    for given in ((x, context), {"x": x, "context": context}):
        assert_backward_is_the_gradient(layer, initial(layer, given), given, mask=mask)


def test_a_learned_score_bias_that_every_layer_reads_learns_from_all_of_them(x64):
    """T5's: scores without a scale, and a table of relative positions behind the first layer."""
    places = 4 + jnp.subtract.outer(jnp.arange(5), jnp.arange(5))
    relative = bh.layer(
        "relative",
        lambda key, x: {"table": jnp.zeros((9, 2))},
        lambda own, x: ({"x": x, "score_bias": jnp.moveaxis(own["table"][places], 2, 0)[None]}, ()),
        lambda own, residuals, dy: (
            {"table": jnp.zeros((9, 2)).at[places].add(jnp.moveaxis(dy["score_bias"][0], 0, 2))},
            dy["x"],
        ),
    )
    block = bh.skip(bh.multi_head_attention(2, scale=1.0), on="x")
    model, x = bh.chain(relative, bh.repeat(block, 3), bh.pick("x")), normal(0, 2, 5, 4)
    assert_backward_is_the_gradient(model, initial(model, x), x)


@pytest.mark.parametrize("rotary", [None, 10000.0])
def test_future_tokens_get_no_blame_from_the_past(rotary):
    layer, x = bh.multi_head_attention(2, causal=True, rotary=rotary), normal(0, 1, 5, 4)
    params = initial(layer, x)
    y, residuals = layer.forward(params, x)
    back = jax.jit(lambda dy: layer.backward(params, residuals, dy)[1])
    for t in range(5):
        dx = back(jnp.zeros_like(y).at[:, t].set(1.0))
        assert not dx[0, t + 1 :].any() and dx[0, : t + 1].all()


def test_padding_gets_no_blame():
    layer, x = bh.multi_head_attention(2), normal(0, 2, 5, 4)
    params, lengths = initial(layer, x), jnp.asarray([3, 5])
    mask = jnp.arange(5)[None] < lengths[:, None]
    y, residuals = layer.forward(params, x, lengths=lengths)
    assert_close(y, layer(params, x, mask=mask))
    dy = jnp.where(mask[..., None], normal(1, *y.shape), 0)
    dx = layer.backward(params, residuals, dy)[1]
    assert not dx[0, 3:].any() and dx[0, :3].all() and dx[1].all()


def test_an_encoder_and_a_decoder_have_masks_of_their_own(x64):
    encoder, decoder = (
        bh.rename(bh.multi_head_attention(2), mask=name) for name in ("source", "target")
    )
    model = bh.chain(encoder, decoder)
    x = normal(0, 2, 4, 4)
    masks = {"source": jnp.asarray([[True, True, False, False]] * 2)}
    masks["target"] = ~masks["source"]
    params = initial(model, x)
    one, other = bh.multi_head_attention(2), bh.multi_head_attention(2)
    y = other(params[1], one(params[0], x, mask=masks["source"]), mask=masks["target"])
    assert_close(model(params, x, **masks), y)
    assert_backward_is_the_gradient(model, params, x, **masks)


def test_norms_per_example_come_from_the_same_pass(x64):
    model = bh.chain(bh.multi_head_attention(2, 1, bias=True, causal=True), bh.flatten())
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 4, 5, 4), "targets": normal(1, 4, 20)}
    params = objective.init(jax.random.key(0), batch)
    assert_gradient_and_norms(objective, params, batch)


def test_it_computes_in_bfloat16_and_learns_in_float32():
    layer, x = bh.multi_head_attention(2, rotary=100.0), normal(0, 2, 5, 4, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    y, residuals = layer.forward(params, x)
    grads, dx = layer.backward(params, residuals, y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}


def test_sizes_that_do_not_agree_are_refused(unchecked):
    for message, settings in {
        "heads divisible by key heads, got 4 and 3": {"heads": 4, "key_heads": 3},
        "heads of at least 1, got 0": {"heads": 0},
        "head_size of at least 1, got 0": {"heads": 2, "head_size": 0},
        "window of at least 1, got 0": {"heads": 2, "window": 0},
        "a positive soft_cap, got -1": {"heads": 2, "soft_cap": -1.0},
        "a positive scale, got 0": {"heads": 2, "scale": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            bh.multi_head_attention(**settings)
    with pytest.raises(TypeError, match=r"base of positions, 10000\.0 as a rule, .* got True"):
        bh.multi_head_attention(2, rotary=True)
    with pytest.raises(TypeError, match="multi_head_attention's scale must be a number, got 'a'"):
        bh.multi_head_attention(2, scale="a")
    with pytest.raises(TypeError, match="multi_head_attention's causal must be True or False"):
        bh.multi_head_attention(2, causal="no")
    key, x = jax.random.key(0), jnp.ones((2, 3, 6))
    for message, layer, given in (
        ("features divisible by its 4 heads, got 6", bh.multi_head_attention(4), x),
        ("an even head size .* got 3", bh.multi_head_attention(2, rotary=10.0), x),
        ("got 3 parts", bh.multi_head_attention(2), (x, x, x)),
        (r"got \['memory', 'x'\]", bh.multi_head_attention(2), {"x": x, "memory": x}),
        (r"\(B, T, D\) .* got \(2, 6\)", bh.multi_head_attention(2), x[:, 0]),
        (r"got \(2, 3, 6\) and \(1, 3, 6\)", bh.multi_head_attention(2), (x, x[:1])),
        (
            r"a score_bias of shape \(B, H, T, S\) = \(2, 2, 3, 3\), .* got \(3, 3\)",
            bh.multi_head_attention(2),
            {"x": x, "score_bias": jnp.ones((3, 3))},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer.init(key, given)
    with pytest.raises(TypeError, match="multi_head_attention needs floating-point input"):
        bh.multi_head_attention(2).init(key, x.astype(jnp.int32))
    with pytest.raises(TypeError, match="needs floating-point score_bias, got int32"):
        bh.multi_head_attention(2).init(key, {"x": x, "score_bias": jnp.ones((1, 1, 3, 3), int)})
    layer = bh.multi_head_attention(2)
    params = layer.init(key, x)
    with pytest.raises(ValueError, match="a mask of shape"):
        layer(params, x, mask=jnp.ones((2, 4), bool))
    with pytest.raises(TypeError, match="no side input 'masks'; did you mean 'mask'"):
        layer(params, x, masks=jnp.ones((2, 3), bool))
