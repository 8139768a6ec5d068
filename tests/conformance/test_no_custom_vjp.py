"""No forward or backward calls an op through the call that runs its hand-written rule.

Through it, `jax.grad` would run the same rule on both sides of a comparison, and every check would
pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import backhand as bh
from backhand.catalogue import ROWS, Row, Spec
from tests.conformance.checks import NAMES, hand_written, problem

pytestmark = pytest.mark.oldest_only


def primitives(jaxpr):
    """The names of all that a program does, whatever it is nested in."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from primitives(value)


def custom_rules(row):
    """The custom rules met on the way forward and back, and by the textbook form."""
    arguments, dy = problem(row, jnp.float32)
    manual = jax.make_jaxpr(lambda *given: hand_written(row, *given))(arguments, dy)
    textbook = jax.make_jaxpr(row.reference)(*arguments)
    return [n for n in (*primitives(manual), *primitives(textbook)) if "custom_vjp" in n]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_no_row_calls_an_op_through_its_rule(row):
    assert custom_rules(row) == []


tanh = bh.ops.tanh
X = (Spec("normal", "B D"),)
PLANTED = {
    "in a forward": lambda x: (tanh(x), tanh.forward(x)[1]),
    "in a jit": lambda x: (jax.jit(tanh)(x), tanh.forward(x)[1]),
    "in a scan": lambda x: (
        lax.scan(lambda carry, row: (carry, tanh(row)), None, x)[1],
        tanh.forward(x)[1],
    ),
    "in a checkpoint": lambda x: (jax.checkpoint(tanh)(x), tanh.forward(x)[1]),
}


@pytest.mark.parametrize("place", PLANTED)
def test_a_call_planted_in_a_forward_is_found(place):
    op = dataclasses.replace(tanh, forward=PLANTED[place])
    assert custom_rules(Row("planted", op, X)) != []


def test_a_call_planted_in_a_backward_is_found():
    op = dataclasses.replace(tanh, backward=lambda y, dy: dy * (1 - y * y) + 0 * tanh(y))
    assert custom_rules(Row("planted", op, X)) != []


def test_a_call_planted_in_a_layer_is_found():
    planted = bh.layer(
        "planted",
        lambda key, x: (),
        lambda params, x: (tanh(x), tanh.forward(x)[1]),
        lambda params, y, dy: ((), tanh.backward(y, dy)),
    )
    assert custom_rules(Row("planted", bh.chain, X, {"act": planted})) != []
