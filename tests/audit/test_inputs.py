"""Bad input: one sentence that says what to do, and the original error behind it."""

import traceback

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


def steps(x):
    yield x


LOSS = bh.objective(bh.dense(3), bh.losses.mean_squared_error)

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
        "the gradient of <lambda> does not run: its forward must take what <lambda> itself takes",
        (rule(lambda x: (x, x), lambda saved, dy: (dy, dy)), X, X),
    ),
    "a forward without residuals": (
        r"its forward must return a pair \(y, residuals\), got an array \(4, 3\) of float32",
        (rule(lambda x, y: x * y, lambda saved, dy: (dy, dy)), X, X),
    ),
    "a rule of too few": (
        r"the gradient of <lambda> does not run: its backward must take \(residuals, dy\)",
        (rule(lambda x, y: (x * y, x), lambda dy: (dy, dy)), X, X),
    ),
    "a rule that raises": (
        r"does not run: division by zero \(in <lambda>, line \d+ of test_inputs.py\)",
        (rule(lambda x, y: (x * y, x), lambda saved, dy: 1 / 0), X, X),
    ),
    "text in": ("is not differentiable: .*; got x: str 'hello'", (jnp.sin, "hello")),
    "an object in": ("got x: an array .* of object", (lambda x: x, np.array([1.0, None]))),
    "None in": ("does not run: .*; it is given b: None", (jnp.dot, X, None)),
    "text out": ("returns a value of type str at .'name'.; it", (lambda x: {"name": "x"}, X)),
    "a generator": ("returns a value of type generator; it must", (steps, X)),
    "nothing out": ("its output is nothing, not floating", (lambda x: None, X)),
    "a boolean index": (r"cannot be traced: how many.*jnp.where\(mask", (lambda x: x[x > 0], X)),
    "NumPy's function": ("cannot be traced.*jnp's functions", (np.sin, X)),
    "a module": ("or a function, got the module numpy", (np, X)),
    "wrong shapes": ("does not run: dot_general requires", (jnp.matmul, X, X)),
    "a layer's arguments": (r"dense: a layer is checked at \(params, x\)", (bh.dense(3), X)),
    "params last": (
        r"\(params, x\), in this order; got an array \(4, 3\) of float32, then a dict",
        (bh.dense(3), X, {"w": X}),
    ),
    "lists in a batch": (
        "batch/inputs is a Python list of numbers",
        (LOSS, {"w": X}, {"inputs": [[1.0], [2.0]], "targets": X}),
    ),
    "annotated arguments": (r"linear\(x, w, b=None\) does not take 1", (bh.ops.linear, X)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_audited_is_refused_in_one_sentence(name, unchecked, nothing_compiles):
    KEPT.clear()
    match, args = REFUSED[name]
    with nothing_compiles(), pytest.raises(TypeError, match=match) as caught:
        bh.check(*args)
    assert "\n" not in str(caught.value)
    if name in ("a callback", "a loop", "wrong shapes", "a leaked tracer", "a rule of too few"):
        assert caught.value.__context__ is not None
        assert "direct cause" not in "".join(traceback.format_exception(caught.value))


def test_a_reference_must_give_the_same_tree_and_shapes(unchecked, nothing_compiles):
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"same tree and shapes, got the output: \(4, 3\)"):
            bh.check(jnp.sin, X, reference=lambda x: (x, x))
        with pytest.raises(ValueError, match="same tree and shapes"):
            bh.check(jnp.sin, X, reference=jnp.sum)
        with pytest.raises(TypeError, match="reference must be a function, got int 3"):
            bh.check(jnp.sin, X, reference=3)
        with pytest.raises(
            ValueError, match=r"\(4, 3\) beside the output: \(4, 3\) of no floating"
        ):
            bh.check(jnp.sin, X, reference=lambda x: x.astype(int))
        with pytest.raises(TypeError, match="side inputs are a layer's"):
            bh.check(jnp.sin, X, side={"training": True})
        with pytest.raises(TypeError, match="got int 3"):
            bh.check(bh.dense(3), {"w": X}, X, side=3)


def test_settings_of_the_audit_are_refused_too(unchecked, nothing_compiles):
    with nothing_compiles():
        with pytest.raises(ValueError, match="no check 'tailor' to skip; did you mean"):
            bh.check(jnp.sin, X, skip="tailor")
        for seed in (-1, "a"):
            with pytest.raises(
                ValueError, match=f"seed must be an integer, 0 or more, got {seed!r}"
            ):
                bh.check(jnp.sin, X, seed=seed)


def test_a_point_without_a_finite_number_judges_nothing(unchecked):
    with pytest.raises(ValueError, match="gives NaN or Inf alone at these arguments"):
        bh.check(lambda x: jnp.log(-jnp.abs(x)), X, costs=False)


def test_lists_of_arrays_are_trees():
    bh.check(lambda xs: xs[0] * xs[1], [X, X], costs=False).assert_passed()


def test_the_first_sentence_of_an_error():
    error = ValueError("one thing is wrong. Try another.\nMore\n")
    assert first_sentence(error) == "one thing is wrong"
    assert first_sentence(KeyError()) == "KeyError"
    assert len(first_sentence(ValueError("x" * 1000))) == 240


def test_counts_are_read_aloud():
    assert [counted(n, "term") for n in (0, 1, 2)] == ["0 terms", "1 term", "2 terms"]
