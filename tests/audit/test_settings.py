"""References with another setting, and that a rule without one is named by them."""

import functools

import jax
import jax.numpy as jnp

import backhand as bh
from backhand import ops
from backhand.audit.settings import of_function, of_row, references
from backhand.catalogue import Row, Spec
from tests.support import normal


def scaled(x, by=2.0, *, clip=False):
    """A function with settings of both kinds."""
    return jnp.clip(by * x, -1, 1) if clip else by * x


def test_each_setting_is_taken_at_its_default_and_at_plain_values():
    found = of_function(scaled, (normal(0, 3), 3.0), ("x", "by"))
    assert list(found) == ["by=2.0", "by=0.0", "by=1.0", "clip=True"]
    assert float(found["by=1.0"](jnp.ones(()), 3.0)) == 1
    bound = functools.partial(scaled, clip=True)
    assert list(of_function(bound, (normal(0, 3),), ("x",))) == ["clip=False"]


def test_a_row_is_taken_without_each_setting():
    row = Row("ops.leaky_relu", ops.leaky_relu, (Spec("normal", "B D"),), {"negative_slope": 0.3})
    ((name, other),) = of_row(row)
    assert (name, other.settings) == ("negative_slope=0.01", {})
    assert list(references(row, row.reference, (), ())) == ["negative_slope=0.01"]


def test_what_has_no_signature_has_no_settings():
    assert of_function(max, (1.0,), ("x",)) == {}


def test_a_rule_that_ignores_a_setting_is_told_which():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def soft(x, eps):
        return x / (jnp.abs(x) + eps)

    def backward(eps, x, dy):
        return (dy / jnp.square(jnp.abs(x) + 1),)

    soft.defvjp(lambda x, eps: (soft(x, eps), x), backward)
    audit = bh.check(soft, normal(0, 6), 0.1, costs=False)
    assert audit.leaves[0].cause.kind == "local" or "eps" in audit.leaves[0].cause.message
