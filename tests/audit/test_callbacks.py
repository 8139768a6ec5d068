"""Calls to the host are named, and one that fails is refused in a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import backhand as bh
from backhand.audit.callbacks import callbacks
from backhand.audit.properties import purity
from backhand.audit.runs import Runs
from backhand.audit.subjects import subject_of

X = jnp.ones(3)


def doubled(called):
    """A rule for 2 x that calls something on its way back."""

    def backward(saved, dy):
        got = called(dy)
        return (2 * (dy if got is None else got),)

    function = jax.custom_vjp(lambda x: 2 * x)
    function.defvjp(lambda x: (2 * x, None), backward)
    return function


def recorded(dy):
    raise RuntimeError("no such table")


def test_a_call_inside_a_loop_is_found_by_its_name():
    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: x + io_callback(recorded, X, x), x)

    assert callbacks(jax.make_jaxpr(looped)(X).jaxpr) == {"io_callback": "recorded"}
    assert callbacks(jax.make_jaxpr(jnp.tanh)(X).jaxpr) == {}


@pytest.mark.parametrize(
    ("called", "note"),
    [
        (lambda dy: jax.debug.print("{}", dy), "it calls jax.debug.print, which an audit runs"),
        (lambda dy: jax.debug.callback(recorded, dy), "it calls jax.debug.callback, which an"),
        (lambda dy: jax.pure_callback(np.negative, dy, dy), "it calls pure_callback, which runs"),
    ],
)
def test_a_call_to_the_host_is_a_note(called, note):
    found = list(purity(Runs(subject_of(doubled(called), (X,)))))
    assert [(f.check, f.passed, f.skipped) for f in found] == [
        ("side effects", True, True),
        ("purity", True, False),
    ]
    assert found[0].message.startswith(note)


def test_a_callback_that_is_not_pure_is_seen():
    def noisy(dy):
        return jax.pure_callback(lambda g: np.random.default_rng().random(g.shape, g.dtype), dy, dy)

    findings = list(purity(Runs(subject_of(doubled(noisy), (X,)))))
    assert (
        findings[-1].message == "two calls give two answers: what pure_callback calls is not pure"
    )


def test_a_side_effect_is_no_pure_function():
    (found,) = purity(Runs(subject_of(doubled(lambda dy: io_callback(recorded, None, dy)), (X,))))
    assert not found.passed
    assert "it has a side effect, io_callback of recorded; return" in found.message


def test_a_call_that_fails_on_the_host_is_one_sentence():
    failing = doubled(lambda dy: jax.pure_callback(recorded, dy, dy))
    with pytest.raises(TypeError, match="host that fails: RuntimeError: no such table; it must"):
        bh.check(failing, X, name="doubled", costs=False)

    def narrow(dy):
        return jax.pure_callback(lambda g: np.asarray(g, np.float32), dy, dy)

    with pytest.raises(TypeError, match=r"^doubled calls a function .* shape and dtype"):
        bh.check(doubled(narrow), X, name="doubled", costs=False)
