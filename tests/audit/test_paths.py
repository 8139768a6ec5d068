"""The reference with a mistake in its reverse gives what somebody who makes it would write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.audit.paths import NONE, Mistakes
from tests.support import normal

X = normal(0, 3, 5)


def centred(x):
    """Each row less its mean, over its root mean square."""
    h = x - jnp.mean(x, axis=1, keepdims=True)
    return h / jnp.sqrt(jnp.mean(h * h, axis=1, keepdims=True))


def gated(x, gate, value):
    return jnp.tanh(x @ gate) * (x @ value)


def recurrent(x, w, u, reverse=False):
    """All states of h = tanh(x w + h u), (T, B, D)."""

    def step(h, x):
        h = jnp.tanh(x @ w + h @ u)
        return h, h

    begin = jnp.zeros((x.shape[1], u.shape[0]), x.dtype)
    return jax.lax.scan(step, begin, x, reverse=reverse)[1]


def gradients(function, arguments, dy, kind, text=""):
    """Under the mistakes of a kind, what the reverse gives, and the truth."""
    made = Mistakes(function, [f"a{i}" for i in range(len(arguments))])

    @jax.jit
    def run(chosen):
        y, pull = jax.vjp(functools.partial(made, chosen), *arguments)
        return y, pull(dy)

    y, pull = jax.vjp(function, *arguments)
    truth = pull(dy)
    for ours, right in zip(run(NONE)[1], truth, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-6)
    known = [n for n, m in enumerate(made.known) if m.kind == kind and text in m.message]
    found = [run(number) for number in known]
    for value, _ in found:
        np.testing.assert_allclose(value, y, rtol=1e-6)
    return [gradient for _, gradient in found], truth


def one_is(found, place, expected):
    return any(np.allclose(each[place], expected, rtol=1e-4, atol=1e-5) for each in found)


def test_a_mean_may_be_taken_for_a_constant():
    dy = normal(1, 3, 5)
    found, _ = gradients(centred, (X,), dy, "sum", "over axis 1 is left out (line ")
    h = X - jnp.mean(X, axis=1, keepdims=True)
    s = jnp.sqrt(jnp.mean(h * h, axis=1, keepdims=True))
    without_mean = (dy - h / s * jnp.mean(dy * h / s, axis=1, keepdims=True)) / s
    without_size = (dy - jnp.mean(dy, axis=1, keepdims=True)) / s
    assert one_is(found, 0, without_mean)
    assert one_is(found, 0, without_size)


def test_a_path_may_be_missing_and_is_named_by_the_argument_on_it():
    gate, value, dy = normal(1, 5, 4), normal(2, 5, 4), normal(3, 3, 4)
    found, truth = gradients(gated, (X, gate, value), dy, "path", "through `a1`")
    assert one_is(found, 0, (dy * jnp.tanh(X @ gate)) @ value.T)
    assert all(np.allclose(each[2], truth[2], rtol=1e-4) for each in found if one_is([each], 0, 0))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_may_be_of_the_wrong_step(reverse):
    x, w, u, dy = normal(0, 4, 2, 3), normal(1, 3, 3), 0.5 * normal(2, 3, 3), normal(3, 4, 2, 3)
    loop = functools.partial(recurrent, reverse=reverse)
    found, truth = gradients(loop, (x, w, u), dy, "step")
    states, dp = loop(x, w, u), _errors(x @ w, u, dy, reverse)
    assert one_is(found, 2, jnp.einsum("tbi,tbo->io", states, dp))
    assert not one_is([truth], 2, jnp.einsum("tbi,tbo->io", states, dp))


def _errors(p, u, dy, reverse):
    """Of what goes into each tanh."""
    return jax.vjp(lambda p: recurrent(p, jnp.eye(len(u)), u, reverse), p)[1](dy)[0]


def test_the_audit_names_the_path():
    rule = jax.custom_vjp(gated)

    def backward(saved, dy):
        x, gate, value = saved
        _, dgate, dvalue = jax.vjp(gated, *saved)[1](dy)
        return (dy * jnp.tanh(x @ gate)) @ value.T, dgate, dvalue

    rule.defvjp(lambda *given: (gated(*given), given), backward)
    audit = bh.check(rule, X, normal(1, 5, 4), normal(2, 5, 4), costs=False)
    (wrong,) = (leaf for leaf in audit.leaves if not leaf.agrees)
    assert (wrong.path, wrong.cause.kind) == ("x", "path")
    assert "the path through `gate` is missing (line " in wrong.cause.message
    assert "test_paths.py" in wrong.cause.message
