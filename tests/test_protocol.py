"""Ops and layers: what they promise, and what they refuse to guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.protocol import Static, output_shape, shapes_of, split_key, split_side
from tests.support import assert_backward_is_the_gradient, assert_close, labels, normal

SQUARE = bh.Op("square", lambda x: (x * x, x), lambda x, dy: 2 * x * dy, jnp.square)
WRONG = bh.Op("wrong", lambda x: (x * x, x), lambda x, dy: -5 * x * dy, jnp.square)


def scale(rule=None):
    return bh.layer(
        "scale",
        lambda key, x: {"s": jnp.ones(())},
        lambda params, x, *, gain, shift=0.0: (gain * params["s"] * x + shift, x),
        rule or (lambda params, x, dy, *, gain: ({"s": gain * jnp.sum(x * dy)}, gain * dy)),
    )


# Ops ----------------------------------------------------------------------------------------------


def test_a_call_is_differentiated_by_the_backward_and_a_forward_by_autodiff():
    assert float(jax.grad(SQUARE)(3.0)) == 6
    assert float(jax.grad(WRONG)(3.0)) == -15
    assert float(jax.grad(lambda x: WRONG.forward(x)[0])(3.0)) == 6
    assert float(jax.grad(WRONG.reference)(3.0)) == 6


def test_an_op_of_several_arrays_has_a_cotangent_for_each_and_none_for_integers():
    table, ids = normal(0, 5, 2), labels(1, 5, 3)
    y, residuals = bh.ops.embedding.forward(table, ids)
    dtable, dids = bh.ops.embedding.cotangents(residuals, jnp.ones_like(y))
    assert (dtable.shape, dids) == ((5, 2), None)
    assert jax.grad(lambda t: bh.ops.embedding(t, ids).sum())(table).shape == (5, 2)


def test_an_optional_array_may_be_left_out():
    x, w, b = normal(0, 2, 3), normal(1, 3, 4), jnp.zeros(4)
    without = jax.grad(lambda *args: bh.ops.linear(*args).sum(), (0, 1))(x, w)
    assert_close(without, jax.grad(lambda *args: bh.ops.linear(*args).sum(), (0, 1))(x, w, b))
    loss = bh.losses.mean_squared_error
    assert_close(jax.grad(lambda x: loss(x, 0 * x)[0])(x), 2 * x, 1e-6)


def test_a_bound_op_keeps_its_arguments_and_its_kind():
    smooth = bh.losses.softmax_cross_entropy.bind(label_smoothing=0.5)
    assert isinstance(smooth, bh.Loss)
    logits, targets = jnp.asarray([[2.0, 0]]), jnp.asarray([0])
    expected = bh.losses.softmax_cross_entropy(logits, targets, label_smoothing=0.5)
    assert_close(smooth(logits, targets), expected, 0)
    with pytest.raises(TypeError, match=r"no argument 'label_smooth'; did you mean 'label_smoo"):
        bh.losses.softmax_cross_entropy.bind(label_smooth=0.5)
    with pytest.raises(TypeError, match="leaky_relu has no argument 'slope'"):
        bh.ops.leaky_relu(1.0, slope=0.5)


# Layers -------------------------------------------------------------------------------------------


def test_a_layer_of_one_op_is_that_op(x64):
    x = normal(0, 3, 4)
    layer = bh.as_layer(SQUARE)
    assert layer.init(jax.random.key(0), x) == ()
    assert_backward_is_the_gradient(layer, (), x)
    assert (repr(layer), repr(SQUARE)) == ("square", "Op('square')")
    assert repr(bh.losses.huber) == "Loss('huber')"


def test_side_inputs_are_the_keyword_arguments_of_forward():
    layer = scale()
    assert layer.uses == {"gain", "shift"}
    params = {"s": jnp.asarray(2.0)}
    y, residuals = layer.forward(params, jnp.asarray(3.0), gain=10.0, shift=1.0)
    assert float(y) == 61
    grads, dx = layer.backward(params, residuals, jnp.ones(()), gain=10.0, shift=1.0)
    assert (float(grads["s"]), float(dx)) == (30, 10)


def test_side_inputs_that_nobody_takes_are_refused(nothing_compiles):
    params, x, key = {"s": jnp.ones(())}, jnp.ones(()), jax.random.key(0)
    unknown = r"scale has no side input 'gian'; did you mean 'gain'\?; it uses 'gain', 'shift'"
    with nothing_compiles():
        with pytest.raises(TypeError, match=unknown):
            scale()(params, x, gian=2.0)
        with pytest.raises(TypeError, match=unknown):
            scale().backward(params, x, x, gian=2.0)
        with pytest.raises(TypeError, match=unknown):
            scale().init(key, x, gian=2.0)
        with pytest.raises(TypeError, match="scale needs the side input 'gain': pass gain="):
            scale()(params, x)
        with pytest.raises(TypeError, match="dense has no side input 'mask'; it uses none"):
            bh.dense(3)(params, x, mask=x)
        with pytest.raises(TypeError, match="the rule uses 'other', the forward not"):
            scale(lambda params, x, dy, *, other: (params, dy))


def test_no_blame_in_is_no_blame_out(x64):
    """A branch that nothing reads gets no error: its gradient is zero, whatever its rule needs."""
    layer = bh.dense(2)
    params = layer.init(jax.random.key(0), normal(0, 3, 4))
    _, residuals = layer.forward(params, normal(0, 3, 4))
    grads, dx = layer.backward(params, residuals, None)
    assert dx is None
    assert_close(grads, jax.tree.map(jnp.zeros_like, params))


def test_init_learns_shapes_without_data():
    layer = bh.chain(bh.dense(3), bh.batch_norm(), bh.dropout(0.5))
    by_shape = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 4), "float32"))
    by_data = layer.init(jax.random.key(0), jnp.full((2, 4), jnp.nan))
    assert_close(by_shape, by_data, 0)
    shape = output_shape(layer, by_shape, jax.ShapeDtypeStruct((7, 4), "bfloat16"), training=False)
    assert (shape.shape, shape.dtype) == ((7, 3), jnp.bfloat16)


def test_shapes_and_settings_are_told_from_arrays():
    tree = {"a": np.zeros((2, 3)), "b": 1.0, "c": jax.ShapeDtypeStruct((), "int32")}
    shapes = shapes_of(tree)
    assert shapes["a"] == jax.ShapeDtypeStruct((2, 3), "float32")
    assert (shapes["b"].shape, shapes["c"].dtype) == ((), jnp.int32)
    mask = jnp.ones(3)
    arrays, settings = split_side({"training": True, "key": None, "mask": mask, "name": "a"})
    assert (list(arrays), settings) == (["mask"], {"training": True, "key": None, "name": "a"})


def test_static_values_live_in_the_structure():
    assert jax.tree.leaves(Static((2, 3))) == []
    _, residuals = jax.jit(lambda x: bh.ops.flatten.forward(x))(jnp.ones((2, 3, 4)))
    assert isinstance(residuals, Static)


def test_children_get_keys_of_their_own():
    key = jax.random.key(0)
    assert split_key(None, 3) is None
    data = [jax.random.key_data(k).tolist() for k in (key, *(split_key(key, i) for i in (0, 1)))]
    assert data[0] != data[1] != data[2] != data[0]


def test_a_raw_key_is_refused(nothing_compiles):
    raw = jnp.zeros(2, jnp.uint32)
    with nothing_compiles(), pytest.raises(TypeError, match=r"jax\.random\.key\(seed\), got uint"):
        split_key(raw, 0)


def test_arrays_may_be_given_by_name():
    x, w, b = normal(0, 3, 4), normal(1, 4, 2), normal(2, 2)
    by_name = jax.grad(lambda b: jnp.sum(bh.ops.linear(x, w, b=b) ** 2))(b)
    by_place = jax.grad(lambda b: jnp.sum(bh.ops.linear(x, w, b) ** 2))(b)
    assert_close(by_name, by_place)

    def total(predictions, **given):
        return bh.losses.mean_squared_error(predictions, x, **given)[0]

    weights = jnp.array([1.0, 0.0, 2.0])
    assert_close(
        jax.grad(total)(2 * x, weights=weights),
        jax.grad(lambda p: bh.losses.mean_squared_error(p, x, weights)[0])(2 * x),
    )


def test_an_array_is_not_bound():
    with pytest.raises(TypeError, match="'weights' is an array"):
        bh.losses.mean_squared_error.bind(weights=jnp.ones(3))


def test_a_layer_whose_key_is_required_can_be_made_and_says_when_it_is_missing():
    noise = bh.layer(
        "noise",
        lambda key, x: (),
        lambda params, x, *, key: (x + jax.random.normal(key, x.shape), ()),
        lambda params, residuals, dy: ((), dy),
    )
    model = bh.chain(bh.dense(3), noise, bh.dense(2))
    params = model.init(jax.random.key(0), jnp.ones((4, 3)))
    assert model(params, jnp.ones((4, 3)), key=jax.random.key(1)).shape == (4, 2)
    with pytest.raises(TypeError, match="noise needs the side input 'key'"):
        model(params, jnp.ones((4, 3)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda params, x, dy: dy, "scale: a rule gives a pair"),
        (lambda params, x, dy: (dy, {"s": dy}), "the parameters are 's'"),
        (lambda params, x, dy: ({"z": jnp.sum(dy)}, dy), "the cotangents 'z'"),
        (lambda params, x, dy: ({"s": dy}, dy), "sum over the batch, or give the factors"),
    ],
)
def test_a_rule_that_gives_something_else_is_told_what_to_give(wrong, message, unchecked):
    layer = bh.layer(
        "scale",
        lambda key, x: {"s": jnp.ones(())},
        lambda params, x: (params["s"] * x, x),
        wrong,
    )
    x = normal(0, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        layer.backward({"s": jnp.ones(())}, x, x)


def test_a_forward_without_residuals_is_told_so(unchecked):
    layer = bh.layer("twice", lambda key, x: (), lambda params, x: 2 * x, lambda p, r, dy: (p, dy))
    with pytest.raises(TypeError, match="twice: a forward gives a pair"):
        layer((), normal(0, 3))


def test_parameters_of_another_model_are_refused(unchecked):
    named, placed = bh.chain(a=bh.dense(2), b=bh.relu()), bh.chain(bh.dense(2), bh.relu())
    x = normal(0, 3, 4)
    params = named.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="2 entries; got a dict of a, b"):
        placed(params, x)
    with pytest.raises(ValueError, match="a dict of a, b; got a tuple of 2"):
        named(placed.init(jax.random.key(0), x), x)
