"""Each kind of subject in one form: names, rule, reference, what is held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.audit.subjects import bound, of_function, subject_of
from backhand.catalogue import ROWS
from tests.support import labels, normal

X = normal(0, 4, 3)


def test_an_op_brings_its_rule_and_its_reference():
    made = subject_of(bh.ops.linear, (X, normal(1, 3, 2)))
    assert (made.name, made.paths) == ("linear", ("x", "w"))
    assert made.rule is not None and made.reference is bh.ops.linear.reference
    assert len(made.pull(*made.at(jnp.float32), [jnp.ones((4, 2))])[1]) == 2


def test_a_layer_holds_its_side_inputs():
    layer = bh.dropout(0.5)
    made = subject_of(layer, ((), X), side={"key": jax.random.key(0), "training": True})
    assert made.paths == ("x",)
    assert "own forward" in made.note
    own, rest = made.at(jnp.float32)
    np.testing.assert_array_equal(made.value(own, rest)[0], made.reference_value(own, rest)[0])
    with pytest.raises(TypeError, match="has no side input 'mask'"):
        subject_of(layer, ((), X), side={"mask": X})


def test_a_reference_of_a_layer_takes_side_inputs_by_name():
    def reference(params, x, training, key):
        return x if training else 2 * x

    side = {"key": jax.random.key(0), "training": True}
    made = subject_of(bh.dropout(0.5), ((), X), reference, side=side)
    assert made.note == ""
    np.testing.assert_array_equal(made.reference_value(*made.at(jnp.float32))[0], X)


def test_a_row_brings_its_arguments_and_what_stays_wide():
    row = next(row for row in ROWS if row.name == "ops.layer_norm")
    made = subject_of(row, ())
    assert made.name == repr(row)
    assert [str(leaf.dtype) for leaf in made.at(jnp.bfloat16)[0]] == [
        "bfloat16",
        "float32",
        "float32",
    ]


def test_an_objective_is_differentiated_in_its_parameters():
    loss = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
    batch = {"inputs": X, "targets": labels(0, 3, 4)}
    params = loss.init(jax.random.key(0), batch)
    made = subject_of(loss, (params, batch))
    assert made.paths == ("b", "w")
    assert made.value(*made.at(jnp.float32))[0].shape == ()
    with pytest.raises(ValueError, match="a batch needs 'targets'"):
        subject_of(loss, (params, {"inputs": X}))
    with pytest.raises(TypeError, match=r"checked at \(params, batch\)"):
        subject_of(loss, (params,))


def test_a_custom_vjp_function_brings_its_primal_code():
    function = jax.custom_vjp(lambda x, scale=2.0: scale * x, nondiff_argnums=(1,))
    function.defvjp(lambda x, scale: (scale * x, ()), lambda scale, _, dy: (scale * dy,))
    made = of_function(function, (X,))
    assert made.arguments[1] == 2.0, "defaults are arguments of the rule"
    np.testing.assert_array_equal(made.pull(*made.at(jnp.float32), [X])[1][0], 2 * X)
    assert "own code, differentiated by JAX" in made.note


def test_another_function_is_its_own_reference():
    function = functools.partial(jnp.multiply, 2.0)
    made = of_function(function, (X,))
    assert (made.rule, made.reference) == (None, function)
    assert "no custom rule" in made.note


def test_names_are_those_that_inspect_knows():
    assert bound("f", lambda x, *rest: x, (1, 2, 3))[0] == ("x", "rest0", "rest1")
    assert bound("f", lambda x, y=1: x, (1,))[0] == ("x",)
    assert bound("f", lambda x, y=1: x, (1,), complete=True) == (("x", "y"), (1, 1))
    with pytest.raises(TypeError, match=r"f\(x\) does not take 2 arguments: too many"):
        bound("f", lambda x: x, (1, 2))


def test_a_rule_is_found_inside_of_jit_and_partial():
    @jax.custom_vjp
    def scaled(x, factor):
        return x * factor

    scaled.defvjp(lambda x, f: (x * f, (x, f)), lambda r, dy: (dy * r[1], jnp.vdot(dy, r[0])))
    x, factor = jnp.ones(3), jnp.asarray(2.0)
    bound = functools.partial(scaled, factor=factor)
    for function, given in (
        (jax.jit(scaled), (x, factor)),
        (bound, (x,)),
        (jax.jit(bound), (x,)),
        (functools.partial(jax.jit(scaled), x), (factor,)),
    ):
        found = subject_of(function, given)
        assert (found.name, found.names) == ("scaled", ("x", "factor"))
        assert found.rule is not None
    plain = functools.partial(jnp.multiply, 2.0)
    assert subject_of(plain, (x,)).rule is None
