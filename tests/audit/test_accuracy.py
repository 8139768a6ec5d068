"""Leaf by leaf: values, gradients in float64, accuracy below it, and what a cause is found from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh
from backhand.audit.accuracy import context, gradients
from backhand.audit.runs import COTANGENTS, Runs
from backhand.audit.subjects import subject_of
from tests.support import labels, normal

X, W = normal(0, 6, 3), normal(1, 3, 2)


def runs(function=bh.ops.linear, args=(X, W), reference=None):
    return Runs(subject_of(function, args, reference))


def checks(findings):
    return {finding.check for finding in findings}


def test_a_right_gradient_has_a_finding_for_each_leaf_and_dtype():
    leaves, findings = gradients(runs())
    assert [leaf.path for leaf in leaves] == ["x", "w"]
    assert all(leaf.agrees and leaf.cause is None for leaf in leaves)
    assert all(finding.passed for finding in findings)
    assert [f.path for f in findings if f.check == "gradient"] == ["x", "w"]
    assert len([f for f in findings if f.check == "accuracy"]) == 6
    for ours, autodiff in leaves[1].errors.values():
        assert 0 <= ours < 0.1 and 0 <= autodiff < 0.1


def test_another_forward_is_found_beside_the_same_gradient():
    _, findings = gradients(runs(lambda x: x + 1e-9, (X,), lambda x: x))
    wrong = [f for f in findings if not f.passed]
    assert checks(wrong) == {"value"}
    assert "the forward is not the reference" in wrong[0].message


def test_a_wrong_gradient_shows_the_two_numbers_and_the_cause():
    leaves, findings = gradients(runs(lambda x: 2 * x, (X,), lambda x: 4 * x))
    (leaf,) = leaves
    (finding,) = (f for f in findings if f.check == "gradient")
    assert not leaf.agrees and leaf.cause.kind == "factor"
    ours, right = (
        float(text.split()[0].rstrip(",")) for text in finding.message.split(": ")[1].split("where")
    )
    np.testing.assert_allclose(2 * ours, right, rtol=1e-4)


def test_without_a_reference_all_three_are_skipped():
    alone = dataclasses.replace(subject_of(lambda x: x, (X,)), reference=None)
    leaves, findings = gradients(Runs(alone))
    assert [(f.check, f.skipped) for f in findings] == [
        ("value", True),
        ("gradient", True),
        ("accuracy", True),
    ]
    assert leaves[0].ours.shape == (COTANGENTS, 6, 3)


def test_a_dtype_that_does_not_run_is_skipped_and_says_why():
    def picky(x):
        if x.dtype == jnp.float16:
            raise TypeError("no float16 here")
        return 2 * x

    _, findings = gradients(runs(picky, (X,), lambda x: 2 * x))
    (skipped,) = (f for f in findings if f.skipped)
    assert skipped.message == "it does not run in float16: no float16 here"


def test_parameters_alone_take_on_no_lower_dtype():
    table, ids = normal(0, 5, 2), labels(0, 5, 3)
    made = bh.embedding(5, 2)
    _, findings = gradients(Runs(subject_of(made, ({"table": table}, ids))))
    assert [f.skipped for f in findings if f.check == "accuracy"].count(True) == 2


def test_the_context_can_run_the_reference_again():
    known = context(runs())
    assert known.batch == 6
    assert known.shapes == {"x": (6, 3), "w": (3, 2), "y": (6, 2)}
    assert set(known.inputs) == {"x", "w"}
    assert known.errors["y"].shape == (COTANGENTS, 6, 2)
    again = known.vjp(known.inputs, known.errors)
    dy = known.errors["y"]
    np.testing.assert_allclose(
        again["w"], np.einsum("bi,sbo->sio", known.inputs["x"], dy), rtol=1e-12
    )


def test_keys_stay_as_they_are():
    def noisy(x, key):
        return x + jax.random.normal(key, x.shape, x.dtype)

    known = context(runs(noisy, (X, jax.random.key(0)), noisy))
    assert set(known.inputs) == {"x"}
    np.testing.assert_array_equal(known.vjp(known.inputs, known.errors)["x"], known.errors["y"])
