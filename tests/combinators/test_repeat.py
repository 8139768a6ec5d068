"""One layer many times over: its gradient, its keys, and what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.ops.linear import linear_dx
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    assert_identical,
    initial,
    labels,
    normal,
    residual_bytes,
    spread,
    temporary_bytes,
)


def block(features=4, wide=8):
    return bh.skip(
        bh.chain(norm=bh.layer_norm(), up=bh.dense(wide), act=bh.gelu(), down=bh.dense(features))
    )


def unrolled(inner, depth):
    """A chain of the same layer, for parameters that `repeat` stacked."""
    layer = bh.chain(*[inner] * depth)
    return layer, lambda stacked: tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)
    )


def test_repeating_is_chaining_with_stacked_parameters(x64):
    x = normal(0, 3, 2, 4)
    layer = bh.repeat(block(), 3)
    params = initial(layer, x)
    assert params["up"]["w"].shape == (3, 4, 8)
    assert not np.array_equal(params["up"]["w"][0], params["up"]["w"][1])
    chained, unstack = unrolled(block(), 3)

    @jax.jit
    def run(params, x):
        y, residuals = layer.forward(params, x)
        results = []
        for layer_, own in ((layer, params), (chained, unstack(params))):
            y, residuals = layer_.forward(own, x)
            results.append((y, *layer_.backward(own, residuals, jnp.cos(y))))
        return results

    ours, expected = run(params, x)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected[1])
    assert_close(ours, (expected[0], stacked, expected[2]))


@pytest.mark.parametrize("around", [lambda inner: inner, bh.checkpoint], ids=["", "checkpoint"])
def test_a_repeated_block_has_the_gradient_and_norms_of_autodiff(x64, around):
    layer = bh.repeat(around(block()), 3)
    objective = bh.objective(layer, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 5, 2, 4), "targets": normal(1, 5, 2, 4)}
    params = spread(objective.init(jax.random.key(0), batch))
    assert_gradient_and_norms(objective, params, batch, depth=1)
    assert_backward_is_the_gradient(layer, params, batch["inputs"])


def test_repeats_can_be_nested(x64):
    x = normal(0, 3, 4)
    layer = bh.repeat(bh.repeat(block(), 2), 2)
    params = initial(layer, x)
    assert params["down"]["b"].shape == (2, 2, 4)
    assert_backward_is_the_gradient(layer, params, x)


# Keys ---------------------------------------------------------------------------------------------

NOISY = bh.chain(act=bh.tanh(), drop=bh.dropout(0.5))


@pytest.mark.parametrize(
    "layer",
    [
        bh.repeat(bh.dropout(0.5), 3),
        bh.repeat(bh.checkpoint(NOISY), 3),
        bh.repeat(bh.chain(bh.dense(64), NOISY, bh.dropout(0.2)), 2),
        bh.checkpoint(bh.chain(NOISY, bh.dropout(0.5))),
        bh.skip(bh.parallel(NOISY, bh.dropout(0.5)).parts[0]),
    ],
    ids=repr,
)
def test_backward_makes_the_masks_of_forward_again(x64, layer):
    x = normal(0, 2, 64)
    params = initial(layer, x)
    key = jax.random.key(5)
    assert_backward_is_the_gradient(layer, params, x, training=True, key=key)


def test_every_step_and_place_drops_its_own():
    x = jnp.ones((1, 512))
    key = jax.random.key(0)
    layer = bh.repeat(bh.dropout(0.5), 4)
    y = layer((), x, training=True, key=key)
    # All four have to keep an element: one in sixteen, where one mask four times keeps every other.
    assert 0.02 < np.mean(y != 0) < 0.12
    assert set(np.unique(y)) == {0, 16}
    chained = bh.chain(bh.dropout(0.5), bh.dropout(0.5))
    assert 0.17 < np.mean(chained(((), ()), x, training=True, key=key) != 0) < 0.33
    first, second = bh.parallel(bh.dropout(0.5), bh.dropout(0.5))(
        ((), ()), x, training=True, key=key
    )
    assert 0.4 < np.mean((first != 0) == (second != 0)) < 0.6
    assert_identical(y, layer((), x, training=True, key=key))
    assert not np.array_equal(y, layer((), x, training=True, key=jax.random.key(1)))
    assert_identical(x, layer((), x, training=False))


def test_forward_and_backward_can_be_compiled_apart(x64):
    layer = bh.chain(
        stem=bh.dense(4),
        body=bh.repeat(bh.checkpoint(bh.chain(block(), NOISY)), 2),
        cut=bh.flatten(),
    )
    x = normal(0, 3, 2, 4)
    params = initial(layer, x)
    side = {"key": jax.random.key(1), "training": True}
    y, residuals = jax.jit(lambda params, x: layer.forward(params, x, **side))(params, x)
    apart = jax.jit(lambda *args: layer.backward(*args, **side))(params, residuals, jnp.cos(y))

    @jax.jit
    def at_once(params, x):
        y, residuals = layer.forward(params, x, **side)
        return layer.backward(params, residuals, jnp.cos(y), **side)

    assert_close(apart, at_once(params, x))


# What is stored -----------------------------------------------------------------------------------


def test_an_array_that_two_residuals_share_is_stored_once():
    layer = bh.repeat(bh.chain(bh.dense(16), bh.relu(), bh.dense(4)), 5)
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    # x of the block, and what is both relu's output and the next layer's input.
    assert residual_bytes(layer, params, x) == 5 * 4 * (3 * 4 + 3 * 16)


def reading_a_context():
    """A block of x and a context beside it, which it reads and passes on."""

    def init(key, x):
        d = x["x"].shape[-1]
        return {name: jnp.eye(d) / (i + 2) for i, name in enumerate(("w", "v"))}

    def forward(params, x):
        h, c = x["x"], x["context"]
        z = jnp.tanh(
            bh.ops.linear.forward(h, params["w"])[0] + bh.ops.linear.forward(c, params["v"])[0]
        )
        return {**x, "x": h + z}, (h, c, z)

    def rule(params, residuals, dy):
        h, c, z = residuals
        dz = dy["x"] * (1 - z * z)
        dh, dc = (linear_dx(dz, params[n], like) for n, like in (("w", h), ("v", c)))
        dx = {**dy, "x": dy["x"] + dh, "context": dy["context"] + dc}
        return {"w": bh.Outer(h, dz), "v": bh.Outer(c, dz)}, dx

    return bh.layer("reading_a_context", init, forward, rule)


def test_a_context_beside_x_is_stored_once_and_its_errors_add_up(x64):
    layer = bh.repeat(reading_a_context(), 4)
    x = {"x": normal(0, 3, 2), "context": normal(1, 3, 2)}
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x)
    size = 8 * 3 * 2
    assert residual_bytes(layer, params, x) == 4 * 2 * size + size


def test_a_checkpointed_context_is_stored_once_too(x64):
    layer = bh.repeat(bh.checkpoint(reading_a_context()), 4)
    x = {"x": normal(0, 3, 2), "context": normal(1, 3, 2), "ids": labels(2, 5, 3)}
    params = initial(layer, x)
    size = 8 * 3 * 2
    assert residual_bytes(layer, params, x) == 4 * size + size + 3 * 4


def scratch(inner, depth, batch, automatic=False):
    """The scratch memory of a compiled gradient."""
    objective = bh.objective(bh.repeat(inner, depth), bh.losses.mean_squared_error)
    params = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    manual = bh.value_and_grad(objective)
    autodiff = jax.value_and_grad(lambda params, batch: objective(params, batch))
    return temporary_bytes(autodiff if automatic else manual, params, batch)


def test_what_is_recomputed_is_a_choice_for_each_part_of_a_block():
    """The part in `checkpoint` keeps its input, the other everything; so does the compiled step."""
    x = jnp.zeros((64, 64))
    part, other, depth = block(64, 256), block(64, 128), 24
    layer = bh.repeat(bh.chain(bh.checkpoint(part), other), depth)

    def stored(layer):
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        return residual_bytes(layer, params, x)

    assert stored(layer) == depth * x.nbytes + stored(bh.repeat(other, depth))
    batch = {"inputs": x, "targets": x}
    both, partly = (
        scratch(bh.chain(around(part), other), depth, batch)
        for around in (lambda inner: inner, bh.checkpoint)
    )
    spared = stored(bh.repeat(part, depth)) - depth * x.nbytes
    assert both - partly > 0.9 * spared, (both - partly) / spared


def test_a_checkpointed_block_keeps_its_input_alone():
    """Its scratch memory is below a quarter at depth 24, and that of `jax.checkpoint` in a scan."""
    x = jnp.zeros((64, 64))
    batch = {"inputs": x, "targets": x}

    def measured(around, depth, automatic=False):
        return scratch(around(block(64, 256)), depth, batch, automatic)

    kept, saved = measured(lambda inner: inner, 24), measured(bh.checkpoint, 24)
    assert saved < 0.25 * kept, saved / kept
    per_step = (saved - measured(bh.checkpoint, 8)) / 16
    assert per_step < 1.2 * x.nbytes, per_step / x.nbytes
    assert saved < 1.05 * measured(bh.checkpoint, 24, automatic=True)


# Refusals -----------------------------------------------------------------------------------------


def test_a_block_that_changes_its_input_is_refused(nothing_compiles):
    x, key = jax.ShapeDtypeStruct((2, 4), jnp.float32), jax.random.key(0)
    with nothing_compiles():
        for inner in (bh.dense(5), bh.cast(jnp.bfloat16)):
            with pytest.raises(ValueError, match=r"repeat: the output of .* must have the shape"):
                jax.eval_shape(bh.repeat(inner, 2).init, key, x)
        with pytest.raises(ValueError, match="a depth of at least 1, got 0"):
            bh.repeat(bh.dense(4), 0)


def test_a_part_of_the_output_that_nobody_uses_has_no_blame():
    """The last layer's rule gives None for the context; the loop hands on zeros."""

    def rule(params, h, dy):
        context = dy["h"] if dy["c"] is None else dy["h"] + dy["c"]
        return {"w": bh.Outer(h, dy["h"])}, {"h": dy["h"] @ params["w"].T, "c": context}

    mix = bh.layer(
        "mix",
        lambda key, x: {"w": jax.random.normal(key, (4, 4))},
        lambda params, x: ({"h": x["h"] @ params["w"] + x["c"], "c": x["c"]}, x["h"]),
        rule,
    )
    select = bh.layer(
        "select",
        lambda key, x: (),
        lambda params, x: (x["h"], ()),
        lambda params, residuals, dy: ((), {"h": dy, "c": None}),
    )
    x = {"h": normal(0, 3, 4), "c": normal(1, 3, 4)}
    model = bh.chain(bh.repeat(mix, 3), select)
    params = initial(model, x)
    y, residuals = model.forward(params, x)
    ours = model.backward(params, residuals, jnp.ones_like(y))
    truth = jax.grad(lambda params, x: jnp.sum(model(params, x)), (0, 1))(params, x)
    assert_close(ours, truth, rtol=1e-5)
