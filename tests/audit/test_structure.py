"""What a rule gives back has the shapes and dtypes of what it was given, or it is named."""

import jax.numpy as jnp
import pytest

from backhand.audit.structure import structure
from tests.audit.test_properties import W, X, one, right, rule, runs
from tests.support import labels, normal


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (lambda dx, dw: (dx, dw[None]), "w", r"shape (1, 3), not its own (3,)"),
        (
            lambda dx, dw: (dx.astype(jnp.bfloat16), dw),
            "x",
            "given float32, its cotangent is bfloat16",
        ),
        (lambda dx, dw: (dx,), "", "1 cotangent for 2 arguments"),
        (lambda dx, dw: (dx, {"w": dw}), "w", "is a dict, no array"),
    ],
)
def test_cotangents_of_another_kind_are_named(change, path, message):
    wrong = runs(rule(lambda saved, dy: change(*right(saved, dy))))
    findings = list(structure(wrong))
    assert any(f.path == path and message in f.message for f in findings), findings
    assert not any(f.passed for f in findings)


def test_an_integer_has_no_cotangent():
    def take(table, ids):
        return table[ids]

    def backward(saved, dy):
        return jnp.zeros_like(saved[0]).at[saved[1]].add(dy), saved[1]

    function = rule(backward, lambda table, ids: (table[ids], (table, ids)), take)
    finding = one(structure, function, normal(0, 5, 2), labels(0, 5, 3))
    assert (finding.path, finding.passed) == ("ids", False)
    assert "it is int32 and has a cotangent" in finding.message


def test_a_rule_in_float32_alone_is_found_in_bfloat16():
    def backward(saved, dy):
        return tuple(leaf.astype(jnp.float32) for leaf in right(saved, dy))

    *notes, verdict = structure(runs(rule(backward)))
    assert all(note.skipped for note in notes) and verdict.passed
    text = "given bfloat16, its cotangent is float32; it counts where an argument is less"
    assert [text in note.message for note in notes] == [True] * 2
    x, w = (leaf.astype(jnp.bfloat16) for leaf in (X, W))
    found = list(structure(runs(rule(backward), x, w)))
    assert [(f.path, f.passed) for f in found] == [("x", False), ("w", False)]


def test_a_plain_function_has_no_rule_to_see():
    assert one(structure, lambda x, w: x * w[None]).skipped
