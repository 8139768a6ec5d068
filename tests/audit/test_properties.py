"""Each property fails where it is broken, passes where it holds, and says why it is skipped."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh
from backhand.audit.properties import (
    empty,
    jit,
    nonfinite,
    properties,
    purity,
    second,
    vmap,
)
from backhand.audit.runs import Runs
from backhand.audit.subjects import subject_of
from tests.support import labels, normal

X, W = normal(0, 4, 3), normal(1, 3)


def rule(backward, forward=lambda x, w: (x * w[None], (x, w)), plain=lambda x, w: x * w[None]):
    function = jax.custom_vjp(plain)
    function.defvjp(forward, backward)
    return function


def right(saved, dy):
    x, w = saved
    return dy * w[None], jnp.sum(dy * x, 0)


def runs(function, *args, reference=None):
    return Runs(subject_of(function, args or (X, W), reference))


def one(check, function, *args, reference=None):
    (finding,) = check(runs(function, *args, reference=reference))
    return finding


def test_a_right_rule_has_every_property():
    findings = properties(runs(rule(right)))
    assert all(finding.passed and not finding.skipped for finding in findings), findings
    assert len(findings) == 6


def test_an_empty_batch_has_a_gradient():
    assert one(empty, rule(right)).passed

    def backward(saved, dy):
        return jnp.stack([row * saved[1] for row in dy]), right(saved, dy)[1]

    broken = one(empty, rule(backward))
    assert not broken.passed
    assert "an empty batch, which the reference takes, fails" in broken.message
    assert one(empty, jnp.sum, X, reference=jnp.sum).skipped

    def refuses(saved, dy):
        if not len(dy):
            raise ValueError("give one example at least")
        return right(saved, dy)

    refused = one(empty, rule(refuses))
    assert (refused.passed, refused.skipped) == (True, True)
    assert "by design? an empty batch, which the reference takes, is refused: give one" in (
        refused.message
    )

    def padded(saved, dy):
        return jnp.zeros((max(len(dy), 1), 3)), right(saved, dy)[1]

    assert not one(empty, rule(padded)).passed


def test_what_changes_between_calls_is_found():
    counter = itertools.count()
    counted = rule(lambda saved, dy: [(1 + 1e-6 * next(counter)) * g for g in right(saved, dy)])
    assert "two calls" in one(purity, counted).message
    rng = np.random.default_rng(0)

    def noisy(x, w):
        return x * w[None] + rng.standard_normal((4, 3)).astype(x.dtype)

    assert "random ones" in one(purity, noisy).message
    assert one(purity, rule(right)).passed


def test_a_rule_that_is_another_under_jit_is_found():
    def backward(saved, dy):
        dx, dw = right(saved, dy)
        return dx, dw if isinstance(dw, jax.core.Tracer) else 2 * dw

    finding = one(jit, rule(backward))
    assert (finding.path, finding.passed) == ("w", False)
    assert one(jit, rule(right)).passed


def test_too_many_operations_are_not_run_one_by_one():
    def long(x):
        for power in range(61):
            x = x ** (power + 2)
        return x

    skipped = one(jit, long, W)
    assert skipped.skipped
    assert (
        "different operations would be compiled by itself, and 50 are the most" in skipped.message
    )

    def repeated(x):
        for _ in range(70):
            x = x * 2
        return x

    found = one(jit, repeated, W)
    assert (found.passed, found.skipped) == (True, False), "one operation is compiled once"


def test_a_rule_that_mixes_examples_under_vmap_is_found():
    @jax.custom_batching.custom_vmap
    def scaled(x):
        return 2 * x

    @scaled.def_vmap
    def _(size, batched, x):
        return 2 * jnp.flip(x, 0), True

    def backward(saved, dy):
        return scaled(dy) / 2 * saved[1][None], right(saved, dy)[1]

    finding = one(vmap, rule(backward))
    assert (finding.path, finding.passed) == ("x", False)
    assert one(vmap, rule(right)).passed


def test_a_nan_that_is_hidden_is_found_and_one_that_spreads_is_noted():
    def hides(x, w):
        return jnp.nan_to_num(x) * w[None]

    hidden = list(nonfinite(runs(hides, reference=lambda x, w: x * w[None])))
    assert [(f.path, f.passed) for f in hidden] == [("x", False)]
    assert "is lost in the output" in hidden[0].message

    def backward(saved, dy):
        dx, dw = right(saved, dy)
        return dx + 0 * jnp.sum(saved[0]), dw

    spread = list(nonfinite(runs(rule(backward))))
    assert [(f.path, f.passed, f.skipped) for f in spread] == [("x", True, True)]
    assert "not finite where the reference's is finite" in spread[0].message


def test_second_derivatives_are_those_of_the_reference():
    def detached(saved, dy):
        return right(saved, dy)[0], jnp.sum(dy * jax.lax.stop_gradient(saved[0]), 0)

    assert one(second, rule(right)).passed
    wrong = one(second, rule(detached))
    assert (wrong.path, wrong.passed) == ("w", False)

    def hosted(saved, dy):
        dx, dw = right(saved, dy)
        return jax.pure_callback(lambda g: np.asarray(g), dx, dx), dw

    opaque = one(second, rule(hosted))
    assert opaque.skipped and "not differentiable itself" in opaque.message


def test_the_derivative_of_a_wrong_gradient_is_left_out():
    (finding,) = (
        f for f in properties(runs(rule(right)), right=False) if f.check == "second derivative"
    )
    assert finding.skipped and "the first is wrong" in finding.message


def test_what_cannot_be_tried_says_why():
    def hosted(saved, dy):
        dx, dw = right(saved, dy)
        return jax.pure_callback(lambda g: np.asarray(g), dx, dx), dw

    (finding,) = (f for f in properties(runs(rule(hosted))) if f.check == "vmap")
    assert finding.skipped and "it cannot be tried" in finding.message


def test_second_derivatives_that_are_zero_are_not_taken_for_a_mistake():
    logits = normal(0, 4, 3, 1)
    loss = bh.losses.softmax_cross_entropy.bind(label_smoothing=0.1)
    found = one(second, loss, logits, labels(1, 1, 4, 3))
    assert found.passed and not found.skipped
