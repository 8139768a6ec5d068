"""Layers after one another and side by side: gradients, trees as inputs, parts without an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    both_gradients,
    initial,
    labels,
    normal,
)


def scaled_pair():
    """x and a scale beside it, of two different shapes, with ids that it passes by."""

    def forward(params, x):
        h, s = x["h"], x["s"]
        y = h * s[:, None] * params["w"][None]
        return {**x, "h": y}, (h, s)

    def rule(params, residuals, dy):
        h, s = residuals
        dh = dy["h"] * s[:, None] * params["w"][None]
        ds = dy["s"] + jnp.sum(dy["h"] * h * params["w"][None], 1)
        dw = bh.Total(dy["h"] * h * s[:, None])
        return {"w": dw}, {**dy, "h": dh, "s": ds}

    return bh.layer("scaled_pair", lambda key, x: {"w": jnp.ones(x["h"].shape[-1])}, forward, rule)


LAYERS = {
    "chain": bh.chain(bh.dense(4), bh.tanh(), bh.dense(3)),
    "named": bh.chain(b=bh.dense(4), act=bh.gelu(), a=bh.layer_norm()),
    "of one": bh.chain(bh.dense(4)),
    "nested": bh.chain(bh.chain(bh.chain(bh.dense(4))), bh.skip(bh.skip(bh.dense(4)))),
    "parallel": bh.parallel(bh.dense(4), bh.chain(bh.tanh(), bh.dense(2))),
    "branches": bh.parallel(left=bh.dense(4), right=bh.tanh()),
    "sum": bh.add(bh.dense(4), bh.tanh()),
    "skip": bh.skip(bh.chain(bh.layer_norm(), bh.dense(8), bh.relu(), bh.dense(4))),
    "skipped sum": bh.skip(bh.add(a=bh.dense(4), b=bh.chain(bh.dense(2), bh.dense(4)))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_backward_of_a_composition_is_its_gradient(x64, name):
    x = normal(0, 3, 2, 4)
    assert_backward_is_the_gradient(LAYERS[name], initial(LAYERS[name], x), x)


def test_a_composition_is_what_it_says(x64):
    x = normal(0, 3, 4)
    double = bh.as_layer(
        bh.Op("double", lambda x: (2 * x, ()), lambda r, dy: 2 * dy, lambda x: 2 * x)
    )
    assert_close(bh.chain(double, double)(((), ()), x), 4 * x)
    assert_close(bh.parallel(double, bh.tanh())(((), ()), x), (2 * x, jnp.tanh(x)))
    assert_close(bh.add(a=double, b=double)({"a": (), "b": ()}, x), 4 * x)
    assert_close(bh.skip(double)((), x), 3 * x)


def test_an_input_may_be_a_tree_with_parts_that_have_no_error(x64):
    x = {"h": normal(0, 3, 4), "s": normal(1, 3), "ids": labels(2, 5, 3)}
    layer = bh.chain(scaled_pair(), bh.repeat(scaled_pair(), 2), scaled_pair())
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x)


def test_blame_ends_where_nothing_floating_came_in(x64):
    """An embedding first: ids have no error, whatever stands before it."""
    ids = labels(0, 7, 2, 6)
    for layer in (
        bh.chain(bh.embedding(7, 4), bh.dense(3)),
        bh.chain(bh.reshape(2, 3), bh.embedding(7, 4), bh.layer_norm()),
        bh.chain(bh.flatten(), bh.add(bh.embedding(7, 4), bh.embedding(7, 4))),
    ):
        params = initial(layer, ids)
        manual, automatic = both_gradients(layer, params, ids)
        assert manual[1] is None
        assert_close(manual, automatic)


def test_a_branch_that_nobody_reads_gets_a_gradient_of_zero(x64):
    layer = bh.chain(
        both=bh.parallel(used=bh.dense(3), unused=bh.chain(bh.dense(3), bh.tanh())),
        only=bh.layer(
            "only",
            lambda key, x: (),
            lambda params, x: (x["used"], ()),
            lambda params, residuals, dy: ((), {"used": dy, "unused": None}),
        ),
    )
    x = normal(0, 2, 4)
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x)
    y, residuals = layer.forward(params, x)
    grads, _ = layer.backward(params, residuals, y)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["both"]["unused"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["both"]["used"]))


def test_a_layer_placed_twice_has_two_sets_of_parameters():
    dense = bh.dense(4)
    params = bh.chain(dense, dense).init(jax.random.key(0), jnp.ones((2, 4)))
    assert not np.array_equal(params[0]["w"], params[1]["w"])
    side_by_side = bh.parallel(dense, dense).init(jax.random.key(0), jnp.ones((2, 4)))
    assert not np.array_equal(side_by_side[0]["w"], side_by_side[1]["w"])


def test_a_skip_hands_blame_back_undiminished(x64):
    x = normal(0, 2, 4)
    layer = bh.skip(bh.chain(bh.dense(4), bh.relu()))
    params = jax.tree.map(jnp.zeros_like, initial(layer, x))
    y, residuals = layer.forward(params, x)
    dy = normal(1, 2, 4)
    assert_close(layer.backward(params, residuals, dy)[1], dy)
    assert_close(y, x)


def test_names_and_structure_are_told():
    layer = bh.chain(hidden=bh.dense(4), body=bh.repeat(bh.skip(bh.chain(bh.dense(4))), 2))
    assert repr(layer) == "chain(hidden=dense, body=repeat(skip(chain(dense))))"
    assert list(layer.parts) == ["hidden", "body"]
    assert bh.skip(bh.dropout(0.5)).uses == {"key", "training"}


def test_branches_that_do_not_fit_are_refused(nothing_compiles):
    x, key = jax.ShapeDtypeStruct((2, 4), "float32"), jax.random.key(0)
    added = bh.chain(bh.add(a=bh.dense(4), b=bh.dense(3)))
    skipped = bh.chain(bh.skip(bh.dense(3)))
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"add: branch 'b' .* of branch 'a': float32\[2, 4\]"):
            jax.eval_shape(added.init, key, x)
        with pytest.raises(ValueError, match=r"inner layer .* its input: .*got float32\[2, 3\]"):
            jax.eval_shape(skipped.init, key, x)
