"""Bad input: one sentence that says what to do, and the original error behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.audit.inputs import counted, first_sentence
from tests.support import labels, normal

X = normal(0, 4, 3)
KEPT = []


def leaks(x):
    KEPT.append(x)
    return x * KEPT[0]


def no_rule():
    return jax.custom_vjp(lambda x: x)


def rule(forward, backward):
    function = jax.custom_vjp(lambda x, y: x * y)
    function.defvjp(forward, backward)
    return function


REFUSED = {
    "no function": ("or a function, got int 3", (3, X)),
    "a callback": (
        "not differentiable: Pure callbacks.*jax.custom_vjp",
        (lambda x: jax.pure_callback(np.sin, x, x), X),
    ),
    "a loop": (
        "not differentiable: Reverse-mode",
        (lambda x: jax.lax.while_loop(lambda s: s.sum() < 3, lambda s: s + 1, x), X),
    ),
    "a complex output": ("gives complex64.*real and imaginary", (jnp.fft.fft, X)),
    "a complex argument": (
        "x is complex64.*real and imaginary",
        (jnp.sin, X.astype(jnp.complex64)),
    ),
    "integers in": ("none of its arguments holds floating", (lambda x: 2.0 * x, labels(0, 3, 4))),
    "integers out": ("its output is int32", (lambda x: jnp.argmax(x), X)),
    "a list": (r"x is a Python list of numbers.*jnp.asarray", (lambda x: x, [1.0, 2.0])),
    "a nested list": ("x/w is a Python list", (lambda x: x, {"w": [[1.0], [2.0]]})),
    "too few arguments": (r"\(x, y\) does not take 1 argument: missing", (lambda x, y: x, X)),
    "too many arguments": (r"does not take 2 arguments: too many", (lambda x: x, X, X)),
    "a branch on a number": (
        "cannot be traced.*jnp.where",
        (lambda x: x if x[0, 0] > 0 else -x, X),
    ),
    "a leaked tracer": ("has a side effect", (leaks, X)),
    "a leak in the rule": (
        "has a side effect: it keeps a traced value",
        (rule(lambda x, y: (x * y, x), lambda saved, dy: (KEPT.append(dy), (dy, dy))[1]), X, X),
    ),
    "no rule": ("no rule yet: call <lambda>.defvjp", (no_rule(), X)),
    "a forward of too few": (
        "the gradient of <lambda> does not run: .* takes 1 positional argument but 2 were given",
        (rule(lambda x: (x, x), lambda saved, dy: (dy, dy)), X, X),
    ),
    "a rule of too few": (
        "the gradient of <lambda> does not run: .* takes 1 positional argument but 2 were given",
        (rule(lambda x, y: (x * y, x), lambda dy: (dy, dy)), X, X),
    ),
    "wrong shapes": ("does not run: dot_general requires", (jnp.matmul, X, X)),
    "a layer's arguments": (r"dense: a layer is checked at \(params, x\)", (bh.dense(3), X)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_audited_is_refused_in_one_sentence(name, unchecked, nothing_compiles):
    KEPT.clear()
    match, args = REFUSED[name]
    with nothing_compiles(), pytest.raises(TypeError, match=match) as caught:
        bh.check(*args)
    assert "\n" not in str(caught.value)
    if name in ("a callback", "a loop", "wrong shapes", "a leaked tracer", "a rule of too few"):
        assert caught.value.__cause__ is not None


def test_a_reference_must_give_the_same_tree_and_shapes(unchecked, nothing_compiles):
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"same tree and shapes, got the output: \(4, 3\)"):
            bh.check(jnp.sin, X, reference=lambda x: (x, x))
        with pytest.raises(ValueError, match="same tree and shapes"):
            bh.check(jnp.sin, X, reference=jnp.sum)
        with pytest.raises(TypeError, match="reference must be a function, got int 3"):
            bh.check(jnp.sin, X, reference=3)
        with pytest.raises(TypeError, match="side inputs are a layer's"):
            bh.check(jnp.sin, X, side={"training": True})


def test_lists_of_arrays_are_trees():
    bh.check(lambda xs: xs[0] * xs[1], [X, X], costs=False).assert_passed()


def test_the_first_sentence_of_an_error():
    error = ValueError("one thing is wrong. Try another.\nMore\n")
    assert first_sentence(error) == "one thing is wrong"
    assert first_sentence(KeyError()) == "KeyError"
    assert len(first_sentence(ValueError("x" * 1000))) == 240


def test_counts_are_read_aloud():
    assert [counted(n, "term") for n in (0, 1, 2)] == ["0 terms", "1 term", "2 terms"]
