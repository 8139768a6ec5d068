"""The plain code behind custom rules, wherever they are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from backhand.audit.inlined import rules, without_rules
from tests.support import normal


@jax.custom_vjp
def square(x):
    """Its rule is wrong, to be told from its code."""
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, dy: (5 * x * dy,))


@jax.custom_jvp
def double(x):
    """The same of a forward rule."""
    return 2 * x


double.defjvp(lambda primals, tangents: (2 * primals[0], 7 * tangents[0]))


def looped(x):
    """A scan."""
    return lax.scan(lambda carry, step: (carry + square(step), carry), jnp.zeros(()), x)[0]


def counted(x):
    """A while loop, which JAX differentiates forward only."""
    body = lambda state: (state[0] + 1, double(state[1]))  # noqa: E731
    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1].sum()


WAYS = {
    "alone": lambda x: square(x).sum(),
    "jitted": lambda x: jax.jit(square)(x).sum(),
    "scan": looped,
    "branch": lambda x: lax.cond(x.sum() > 0, square, lambda x: x * x, x).sum(),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(square(x)))(x).sum(),
    "forward rule": lambda x: double(x * x).sum(),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_code_is_differentiated_in_place_of_the_rule(name):
    function, x = WAYS[name], normal(0, 4)
    plain = without_rules(function)
    assert rules(function, x) in (["square"], ["double"])
    assert rules(plain, x) == []
    np.testing.assert_allclose(plain(x), function(x), rtol=1e-6)
    step = 1e-2
    right = (function(x + step) - function(x - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(plain)(x).sum(), right, rtol=2e-3)
    assert abs(jax.grad(function)(x).sum() - right) > 0.1


def test_a_loop_without_an_end_that_is_known_keeps_its_values():
    x = normal(0, 4)
    np.testing.assert_allclose(without_rules(counted)(x), 8 * x.sum(), rtol=1e-6)
    tangent = jax.jvp(without_rules(counted), (x,), (jnp.ones(4),))[1]
    np.testing.assert_allclose(tangent, 32, rtol=1e-6)


def test_rules_of_jax_itself_stay():
    assert rules(lambda x: jax.nn.relu(x), normal(0, 4)) == []
    assert jax.grad(without_rules(jax.nn.relu))(0.0) == 0.0


def test_trees_settings_and_outputs_are_those_of_the_function():
    def function(params, power, scale):
        return {"y": square(params["x"]) ** power * (1 if scale is None else scale)}

    found = without_rules(function)({"x": jnp.full(2, 3.0)}, 2, None)
    np.testing.assert_allclose(found["y"], 81)
