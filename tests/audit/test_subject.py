"""Arguments as leaves and back, in any dtype; two ways to pull an error back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backhand.audit.subject import Rule, Subject
from tests.support import labels, normal

X, W, IDS, KEY = normal(0, 4, 3), normal(1, 3), labels(2, 5, 4), jax.random.key(0)


def subject(*arguments, names=None, function=lambda *args: args[0], **given):
    return Subject("f", function, arguments, names or tuple("abcdefgh"[: len(arguments)]), **given)


def test_paths_name_the_argument_and_the_place_in_it():
    made = subject({"w": X, "b": (W, IDS)}, X, "mode", None, KEY, names=("p", "x", "m", "n", "k"))
    assert made.paths == ("p/b/0", "p/w", "x")
    own, rest = made.at(jnp.float32)
    assert [leaf.shape for leaf in own] == [(3,), (4, 3), (4, 3)]
    assert [str(leaf.dtype) for leaf in rest] == ["int32", "key<fry>"]
    rebuilt = made.rebuild(own, rest)
    assert rebuilt[2:4] == ("mode", None)
    assert rebuilt[0]["w"] is own[1]


def test_paths_that_repeat_are_told_apart():
    assert subject({"x": X}, X, names=("", "x")).paths == ("0/x", "1/x")


def test_what_is_held_is_not_differentiated():
    made = subject(X, W, held=frozenset({1}))
    assert made.paths == ("a",)
    assert [leaf.shape for leaf in made.at(jnp.float64)[1]] == [(3,)]


def test_functions_in_a_module_are_held_fixed():
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    made = subject(model, names=("model",))
    assert len(made.paths) == 4
    assert made.rebuild(*made.at(jnp.float32))[0].activation is model.activation


def test_wide_leaves_stay_in_float32():
    made = subject(X, W, wide=frozenset({"b"}))
    assert [str(leaf.dtype) for leaf in made.at(jnp.bfloat16)[0]] == ["bfloat16", "float32"]
    assert made.narrows
    assert not subject(X, wide=frozenset({"a"})).narrows
    mixed = subject(X.astype(jnp.bfloat16), W)
    assert [str(leaf.dtype) for leaf in mixed.at(jnp.float16)[0]] == ["float16", "float32"]
    assert [leaf.dtype for leaf in mixed.shaped(jnp.float16)[0]] == [jnp.float16, jnp.float32]


def test_numbers_are_rounded_before_they_are_widened(x64):
    (wide,), _ = subject(X).at(jnp.float64, rounded=jnp.bfloat16)
    assert wide.dtype == jnp.float64
    np.testing.assert_array_equal(wide, np.asarray(X.astype(jnp.bfloat16), np.float64))


def test_arrays_go_by_name_and_back(x64):
    made = subject(X, IDS, KEY)
    numbers, keys = made.named(jnp.float64)
    assert (set(numbers), set(keys)) == ({"a", "b"}, {"c"})
    own, rest = made.from_named(numbers, keys)
    np.testing.assert_array_equal(own[0], np.asarray(X, np.float64))
    assert [leaf.shape for leaf in rest] == [(4,), ()]


def test_the_gradient_of_the_first_argument_is_found_by_its_tree():
    made = subject({"w": X, "ids": IDS, "b": W}, X)
    found = made.of_first({"w": 2 * X, "ids": None, "b": 2 * W})
    assert [leaf.shape for leaf in found] == [(3,), (4, 3)]
    with pytest.raises(ValueError, match="the tree and the shapes of the first argument"):
        made.of_first({"w": W, "ids": None, "b": X})


def backward(arguments, residuals, dy):
    return dy * arguments[1][None], None


def test_a_rule_is_run_as_it_is():
    rule = Rule(lambda x, w: (x * w[None], None), backward)
    made = subject(X, W, rule=rule, reference=lambda x, w: x * w[None])
    own, rest = made.at(jnp.float32)
    y, (dx, dw) = made.pull(own, rest, [jnp.ones_like(X)])
    assert y[0].shape == X.shape
    np.testing.assert_allclose(dx, np.broadcast_to(W, X.shape))
    assert not dw.any(), "None stands for zeros"
    expected = made.automatic(own, rest, [jnp.ones_like(X)])[1]
    np.testing.assert_allclose(expected[1], jnp.sum(X, 0), rtol=1e-6)


def test_outputs_of_integers_have_no_error():
    def function(x):
        return {"y": 2 * x, "n": jnp.argmax(x)}

    made = subject(X, function=function)
    y, (dx,) = made.pull(*made.at(jnp.float32), [jnp.ones_like(X)])
    assert len(y) == 1
    np.testing.assert_array_equal(dx, 2 * np.ones_like(X))
