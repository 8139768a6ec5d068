"""The harness can fail: backward passes with one mistake each, all of which it names."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.catalogue import ROWS, Row, Spec
from backhand.contributions import Outer, Total
from tests.conformance.checks import faults
from tests.conformance.test_dtypes import worse_than_automatic

pytestmark = pytest.mark.oldest_only

ops, losses = bh.ops, bh.losses


def row_of(subject):
    """The first row of an op, a loss or a layer."""
    return next(row for row in ROWS if row.subject is subject)


def planted(op, **changed):
    """The op's row with another forward or backward."""
    return dataclasses.replace(row_of(op), subject=dataclasses.replace(op, **changed))


def after(op, change):
    """The op's row, its cotangents changed by a function of all of them."""
    return planted(op, backward=lambda *args, **static: change(*op.cotangents(*args, **static)))


SQUARE = Row("ops.linear", ops.linear, (Spec("normal", "B D"), Spec("normal", "D D"), None))


def square(backward):
    """A linear map from D to D features, where a transposed factor has the right shape."""
    return dataclasses.replace(SQUARE, subject=dataclasses.replace(ops.linear, backward=backward))


def without_the_mean(residuals, dy, *, eps=1e-5):
    dx, *rest = ops.layer_norm.backward(residuals, dy, eps=eps)
    g = dy * residuals.scale[None, None]
    return dx + residuals.rstd * jnp.mean(g, -1, keepdims=True), *rest


def without_the_division(residuals, dy, *, eps=1e-5):
    dx, *rest = ops.layer_norm.backward(residuals, dy, eps=eps)
    g = dy * residuals.scale[None, None]
    missing = jnp.sum(g, -1, keepdims=True) - jnp.mean(g, -1, keepdims=True)
    return dx - residuals.rstd * missing, *rest


def without_the_weight(residuals, dy):
    return losses.mean_squared_error.backward(residuals, (dy[0], jnp.zeros_like(dy[1])))


BUGS = {
    "a sign": after(ops.tanh, lambda dx: -dx),
    "a factor of 1.001": after(ops.tanh, lambda dx: 1.001 * dx),
    "a factor of 1 + 1e-9": after(ops.tanh, lambda dx: (1 + 1e-9) * dx),
    "a missing mean": planted(ops.layer_norm, backward=without_the_mean),
    "a missing division": planted(ops.layer_norm, backward=without_the_division),
    "a transposed weight": square(lambda saved, dy: (dy @ saved[1], saved[0].T @ dy, None)),
    "a transposed gradient": square(lambda saved, dy: (dy @ saved[1].T, dy.T @ saved[0], None)),
    "another axis summed": planted(
        ops.softmax, backward=lambda y, dy: y * (dy - jnp.sum(y * dy, 1, keepdims=True))
    ),
    "a dropped term": planted(
        ops.gelu, backward=lambda x, dy, *, approximate=False: dy * jax.scipy.stats.norm.cdf(x)
    ),
    "residuals of another example": planted(
        ops.tanh, forward=lambda x: (jnp.tanh(x), jnp.tanh(jnp.roll(x, 1, 0)))
    ),
    "residuals from before the update": planted(ops.tanh, forward=lambda x: (jnp.tanh(x), x)),
    "another dtype": after(ops.linear, lambda dx, dw, db: (dx, dw.astype(jnp.float32), db)),
    "another shape": after(ops.linear, lambda dx, dw, db: (dx, dw, db[None])),
    "swapped cotangents": after(ops.layer_norm, lambda dx, dscale, doffset: (dx, doffset, dscale)),
    "swapped arguments": after(losses.mean_squared_error, lambda dp, dt, dw: (dt, dp, dw)),
    "one element": after(ops.linear, lambda dx, dw, db: (dx, dw.at[0, 0].mul(1 + 1e-9), db)),
    "one element not finite": after(ops.tanh, lambda dx: dx.at[0, 0, 0].set(jnp.nan)),
    "a missing cotangent": after(ops.linear, lambda dx, dw, db: (dx, None, db)),
    "one cotangent too few": after(ops.linear, lambda dx, dw, db: (dx, dw)),
    "a cotangent of integers": after(ops.embedding, lambda dtable, _: (dtable, jnp.zeros((4, 3)))),
    "another output": planted(ops.tanh, forward=lambda x: (1.001 * jnp.tanh(x), jnp.tanh(x))),
    "the error of the weight dropped": dataclasses.replace(
        planted(losses.mean_squared_error, backward=without_the_weight),
        inputs=(Spec("normal", "B T"), Spec("normal", "B T"), Spec("weights", "B")),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, x64):
    assert faults(BUGS[bug]) != []


@pytest.mark.parametrize("row", [SQUARE, row_of(ops.tanh), row_of(ops.layer_norm)], ids=repr)
def test_the_rows_that_bugs_are_planted_in_are_right(row, x64):
    assert faults(row) == []


def wrong_dense(rule):
    """A dense layer with another rule, inside a chain."""
    right = bh.dense(4)
    wrong = bh.layer("dense", right.init, lambda params, x: right.forward(params, x), rule)
    return Row("planted", bh.chain, (Spec("normal", "B D"),), {"wrong": wrong, "act": bh.tanh()})


RULES = {
    "half the error of a bias": lambda params, x, dy: (
        {"w": Outer(x, dy), "b": Total(dy / 2)},
        dy @ params["w"].T,
    ),
    "factors of another example": lambda params, x, dy: (
        {"w": Outer(jnp.roll(x, 1, 0), dy), "b": Total(dy)},
        dy @ params["w"].T,
    ),
    "no error of the input": lambda params, x, dy: (
        {"w": Outer(x, dy), "b": Total(dy)},
        jnp.zeros_like(x),
    ),
}


@pytest.mark.parametrize("bug", RULES)
def test_a_wrong_rule_of_a_layer_is_caught(bug, x64):
    assert faults(wrong_dense(RULES[bug])) != []


@pytest.mark.parametrize("kind", [Outer, Total])
def test_a_wrong_sum_of_contributions_is_caught(kind, x64, monkeypatch):
    right = kind.sum
    row = row_of(bh.layers.dense)
    assert faults(row) == []
    monkeypatch.setattr(kind, "sum", lambda self, param: right(self, param) / len(self.dy))
    assert faults(row) != []


def test_a_combinator_that_drops_a_branch_is_caught(x64, monkeypatch):
    row = next(row for row in ROWS if row.name == "combinators.add")
    monkeypatch.setattr("backhand.combinators.compose.add_errors", lambda a, b: b)
    assert faults(row) != []


def test_an_error_rounded_on_the_way_is_caught_in_low_precision():
    """Right to three digits, as float32 is to seven: only the comparison with float64 sees it."""
    rounded = after(ops.tanh, lambda dx: dx.astype(jnp.bfloat16).astype(dx.dtype))
    assert worse_than_automatic(row_of(ops.tanh), jnp.float32) == []
    assert worse_than_automatic(rounded, jnp.float32) != []
