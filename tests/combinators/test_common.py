"""What every combinator refuses and remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.combinators.common import add_errors, located, pack, parts_of, same_shape, side_of
from tests.support import assert_close


@pytest.mark.parametrize("combinator", [bh.chain, bh.parallel, bh.add])
def test_layers_come_by_position_or_by_name(unchecked, nothing_compiles, combinator):
    name = combinator.__name__ if combinator is not bh.add else "parallel"
    with nothing_compiles():
        with pytest.raises(ValueError, match=f"{name} needs at least one layer, got none"):
            combinator()
        with pytest.raises(ValueError, match=r"by position or by name, not both; got 1 pos.* out:"):
            combinator(bh.relu(), out=bh.dense(1))
        with pytest.raises(TypeError, match=r"got <function relu .* at 1; .* relu\(\) rather than"):
            combinator(bh.dense(1), bh.relu)
        with pytest.raises(TypeError, match="takes layers, got 3 at 'act'"):
            combinator(act=3)
        with pytest.raises(TypeError, match="at 0; give its layers one by one"):
            combinator([bh.relu(), bh.tanh()])


@pytest.mark.parametrize(
    "combinator",
    [
        bh.skip,
        bh.checkpoint,
        bh.freeze,
        bh.tally,
        lambda layer: bh.repeat(layer, 2),
        lambda layer: bh.on("x", layer),
        lambda layer: bh.share(layer, {"b": "a"}),
        lambda layer: bh.rename(layer, mask="known"),
    ],
)
def test_what_makes_a_layer_is_not_one(unchecked, combinator):
    with pytest.raises(TypeError, match=r"got <function relu .* relu\(\) rather than"):
        combinator(bh.relu)


def test_one_value_for_each_layer_in_model_order():
    named = parts_of("chain", (), {"b": bh.relu(), "a": bh.tanh()})
    assert list(pack(named, {"a": 1, "b": 2})) == ["b", "a"]
    positional = parts_of("chain", (bh.relu(), bh.tanh()), {})
    assert pack(positional, {1: "second", 0: "first"}) == ("first", "second")


def test_a_layer_gets_the_side_inputs_that_it_uses_and_a_key_of_its_own():
    key = jax.random.key(0)
    side = {"training": True, "key": key}
    assert side_of(bh.relu(), side, 0) == {}
    assert side_of(bh.batch_norm(), side, 0) == {"training": True}
    first, second = (side_of(bh.dropout(0.5), side, place)["key"] for place in (0, 1))
    assert not np.array_equal(jax.random.key_data(first), jax.random.key_data(second))
    assert side_of(bh.dropout(0.5), {"training": True, "key": None}, 1)["key"] is None


def test_errors_of_one_array_add_up_and_none_is_no_error():
    one = jnp.ones(2)
    assert add_errors(None, None) is None
    assert add_errors(one, None) is one
    assert add_errors(None, one) is one
    assert_close(add_errors(one, one), 2 * one)
    tree = add_errors({"x": one, "ids": None, "c": None}, {"x": one, "ids": None, "c": one})
    assert_close(tree, {"x": 2 * one, "ids": None, "c": one})
    assert_close(add_errors((one, None), None), (one, None))


def test_trees_that_differ_are_described(nothing_compiles):
    shape = jax.ShapeDtypeStruct
    a = {"x": shape((2, 3), "float32")}
    same_shape("a", a, "b", dict(a))
    for other in (
        {"x": shape((2, 4), "float32")},
        {"x": shape((2, 3), "bfloat16")},
        {"y": shape((2, 3), "float32")},
        {**a, "y": shape((), "int32")},
        shape((2, 3), "float32"),
    ):
        with nothing_compiles(), pytest.raises(ValueError, match=r"a must have .* of b: .*; got "):
            same_shape("a", a, "b", other)


def test_an_error_says_where_in_the_model_it_came_from(nothing_compiles):
    model = bh.chain(stem=bh.dense(4), body=bh.skip(bh.chain(up=bh.dense(5), down=bh.dense(3))))
    x, key = jax.ShapeDtypeStruct((2, 3), "float32"), jax.random.key(0)
    with nothing_compiles(), pytest.raises(ValueError, match="skip: the output") as caught:
        jax.eval_shape(model.init, key, x)
    assert caught.value.__notes__[0] == "in layer 'body' of chain"
    with pytest.raises(ValueError, match="no") as caught, located("chain", "a"):
        raise ValueError("no")
    assert caught.value.__notes__ == ["in layer 'a' of chain"]
