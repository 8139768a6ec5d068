"""The whole audit: right rules of every kind pass, wrong ones fail at the right leaf."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.catalogue import ROWS
from tests.support import labels, normal, spread


def linear(change=lambda dx, dw, db: (dx, dw, db), cast=None):
    """A linear layer by hand, its cotangents changed."""

    @jax.custom_vjp
    def linear(x, w, b):
        return forward(x, w, b)[0]

    def forward(x, w, b):
        if cast is not None:
            x, w, b = (leaf.astype(cast) for leaf in (x, w, b))
        return x @ w + b[None], (x, w)

    def backward(residuals, dy):
        x, w = residuals
        return change(dy @ w.T, x.T @ dy, jnp.sum(dy, 0))

    linear.defvjp(forward, backward)
    return linear


def textbook(x, w, b):
    return x @ w + b[None]


SMALL = normal(0, 5, 4), normal(1, 4, 3), normal(2, 3)
LARGE = normal(0, 64, 256), normal(1, 256, 256), normal(2, 256)

BUGS = {
    "a bias 5% off": ("b", lambda dx, dw, db: (dx, dw, 1.05 * db)),
    "a factor of 1.001": ("w", lambda dx, dw, db: (dx, 1.001 * dw, db)),
    "a factor of 1 + 1e-9": ("x", lambda dx, dw, db: ((1 + 1e-9) * dx, dw, db)),
    "one element, by 1e-9": ("w", lambda dx, dw, db: (dx, dw.at[3, 2].mul(1 + 1e-9), db)),
    "a mean": ("w", lambda dx, dw, db: (dx, dw / 5, db)),
    "a sign": ("x", lambda dx, dw, db: (-dx, dw, db)),
    "nothing": ("b", lambda dx, dw, db: (dx, dw, 0 * db)),
    "rounded": ("w", lambda dx, dw, db: (dx, dw.astype(jnp.bfloat16).astype(dw.dtype), db)),
    "not finite": ("w", lambda dx, dw, db: (dx, dw.at[1, 1].set(jnp.nan), db)),
    "another shape": ("b", lambda dx, dw, db: (dx, dw, db[None])),
    "another dtype": ("b", lambda dx, dw, db: (dx, dw, db.astype(jnp.float16))),
    "None": ("w", lambda dx, dw, db: (dx, None, db)),
}


def wrong_paths(audit):
    return {
        finding.path for finding in audit.failures if finding.check in ("gradient", "structure")
    }


def test_a_right_rule_passes_every_check():
    audit = bh.check(linear(), *SMALL)
    audit.assert_passed()
    assert [leaf.path for leaf in audit.leaves] == ["x", "w", "b"]
    assert {finding.check for finding in audit.findings if not finding.skipped} == {
        "value",
        "reference",
        "gradient",
        "accuracy",
        "taylor",
        "structure",
        "zero size",
        "purity",
        "jit",
        "vmap",
        "nonfinite",
        "second derivative",
    }
    assert all(set(leaf.errors) == {"float32", "bfloat16", "float16"} for leaf in audit.leaves)
    assert audit.cost is not None
    assert audit.leaves[1].ours.shape == (3, 4, 3)
    json.dumps(audit.to_dict(), allow_nan=False)


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_leaf_is_named(bug):
    path, change = BUGS[bug]
    audit = bh.check(linear(change), *SMALL, costs=False)
    assert not audit.passed
    assert wrong_paths(audit) == {path}
    named = [leaf.path for leaf in audit.leaves if not leaf.agrees]
    assert named in ([path], []) if bug == "another dtype" else named == [path]
    with pytest.raises(AssertionError, match=path):
        audit.assert_passed()


@pytest.mark.parametrize(
    ("bug", "kind"), [("a mean", "mean"), ("a sign", "sign"), ("nothing", "zero")]
)
def test_a_wrong_leaf_has_a_cause(bug, kind):
    path, change = BUGS[bug]
    audit = bh.check(linear(change), *SMALL, costs=False)
    (leaf,) = (leaf for leaf in audit.leaves if not leaf.agrees)
    assert (leaf.path, leaf.cause.kind) == (path, kind)
    assert leaf.cause.message in " ".join(str(audit).split())


@pytest.mark.parametrize("cast", [None, jnp.float32], ids=["float64", "float32 alone"])
@pytest.mark.parametrize("factor", [1, 1.05, 1.001])
def test_a_bias_of_a_large_linear_layer(cast, factor):
    """check_grads fails the right one in float32, or passes the one that is 5% off."""
    rule = linear(lambda dx, dw, db: (dx, dw, factor * db), cast)
    audit = bh.check(rule, *LARGE, reference=textbook, costs=False)
    assert audit.passed == (factor == 1), str(audit)
    assert wrong_paths(audit) <= {"b"}


def test_float32_alone_still_shows_one_wrong_element():
    rule = linear(lambda dx, dw, db: (dx, dw.at[100, 7].mul(1.001), db), jnp.float32)
    audit = bh.check(rule, *LARGE, reference=textbook, costs=False)
    assert wrong_paths(audit) == {"w"}
    (leaf,) = (leaf for leaf in audit.leaves if not leaf.agrees)
    assert leaf.where == (100, 7)
    assert any(f.check == "float64" and "float32" in f.message for f in audit.findings)


def test_a_rule_that_loses_its_digits_is_less_accurate_than_autodiff():
    def cancels(dx, dw, db):
        return dx, jax.lax.optimization_barrier(dw + 1e4) - 1e4, db

    audit = bh.check(linear(cancels), *SMALL, costs=False)
    assert {(f.check, f.path) for f in audit.failures if f.check != "second derivative"} >= {
        ("accuracy", "w")
    }
    assert not any(f.check == "gradient" for f in audit.failures)


def test_a_wrong_reference_is_found():
    audit = bh.check(linear(), *SMALL, reference=lambda x, w, b: textbook(x, w, b) + x[:, :3])
    assert {"value", "gradient"} <= {finding.check for finding in audit.failures}
    stopped = bh.check(
        linear(), *SMALL, reference=lambda x, w, b: textbook(jax.lax.stop_gradient(x), w, b)
    )
    assert any(f.check == "taylor" and "the reference's" in f.message for f in stopped.failures)


def test_without_a_reference_the_values_judge():
    def scaled(x, factor):
        return factor * x**2

    audit = bh.check(scaled, normal(0, 4), 3.0, costs=True)
    audit.assert_passed()
    assert audit.cost is None
    assert [leaf.path for leaf in audit.leaves] == ["x"], "3.0 is a setting, held fixed"
    wrapped = jax.jit(linear(BUGS["a sign"][1]))
    wrong = bh.check(lambda x, w, b: wrapped(x, w, b), *SMALL, costs=False)
    assert {(f.check, f.path) for f in wrong.failures} == {("gradient", "x"), ("taylor", "x")}


CHOSEN = ["layers.dense(features=4)", "ops.embedding(ids)", "ops.relu()"]
CHOSEN += ["losses.softmax_cross_entropy(ids, mask)", "layers.batch_norm(training=False)"]
CHOSEN += ["ops.cast(dtype='bfloat16')", "layers.dropout(rate=0.25, training=False)"]


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_of_the_catalogue_pass(name):
    row = next(row for row in ROWS if repr(row) == name)
    audit = bh.check(row, costs=False)
    audit.assert_passed()
    assert audit.name == name


def test_an_op_is_checked_with_its_settings_and_optional_arrays():
    op = bh.ops.layer_norm.bind(eps=0.1)
    bh.check(op, normal(0, 4, 6), normal(1, 6), normal(2, 6), costs=False).assert_passed()
    bh.check(bh.ops.linear, *SMALL[:2], costs=False).assert_passed()
    wrong = dataclasses.replace(op, backward=lambda *a, **k: [-g for g in op.cotangents(*a, **k)])
    wrong = dataclasses.replace(wrong, backward=lambda r, dy: tuple(-g for g in op.backward(r, dy)))
    audit = bh.check(wrong, normal(0, 4, 6), normal(1, 6), normal(2, 6), costs=False)
    assert [leaf.cause.kind for leaf in audit.leaves] == ["sign"] * 3


def test_a_layer_is_checked_with_its_side_inputs_and_reports_in_model_order():
    model = bh.chain(stem=bh.dense(4), drop=bh.dropout(0.5), head=bh.dense(2))
    x = normal(0, 6, 3)
    params = spread(model.init(jax.random.key(0), x))
    side = {"key": jax.random.key(1), "training": True}
    audit = bh.check(model, params, x, side=side, costs=False)
    audit.assert_passed()
    assert [leaf.path for leaf in audit.leaves] == ["stem/b", "stem/w", "head/b", "head/w", "x"]
    right = bh.check(
        bh.dense(2),
        {"w": normal(0, 3, 2), "b": normal(1, 2)},
        x,
        reference=lambda params, x: x @ params["w"] + params["b"][None],
        costs=False,
    )
    right.assert_passed()


def test_an_objective_is_checked_in_its_parameters():
    loss = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
    batch = {"inputs": normal(0, 8, 4), "targets": labels(1, 3, 8)}
    params = spread(loss.init(jax.random.key(0), batch))
    audit = bh.check(loss, params, batch, costs=False)
    audit.assert_passed()
    assert [leaf.path for leaf in audit.leaves] == ["b", "w"]


def test_keys_and_integers_are_held_and_nondiff_argnums_too():
    def gather(table, ids, key, power):
        return table[ids] ** power * jax.random.bernoulli(key, 0.5, ids.shape)[:, None].astype(
            table.dtype
        )

    rule = jax.custom_vjp(gather, nondiff_argnums=(3,))
    rule.defvjp(
        lambda table, ids, key, power: (gather(table, ids, key, power), (table, ids, key)),
        lambda power, saved, dy: (
            jnp.zeros_like(saved[0])
            .at[saved[1]]
            .add(
                dy
                * power
                * saved[0][saved[1]] ** (power - 1)
                * jax.random.bernoulli(saved[2], 0.5, saved[1].shape)[:, None].astype(dy.dtype)
            ),
            None,
            None,
        ),
    )
    ids = jnp.asarray([1, 1, 3], jnp.int32)
    audit = bh.check(rule, normal(0, 5, 2), ids, jax.random.key(3), 2, costs=False)
    audit.assert_passed()
    assert [leaf.path for leaf in audit.leaves] == ["table"]


def test_the_name_and_the_seed_are_the_callers():
    first, again, other = (
        bh.check(linear(), *SMALL, name="mine", seed=seed, costs=False) for seed in (0, 0, 1)
    )
    assert first.name == "mine"
    np.testing.assert_array_equal(first.leaves[0].truth, again.leaves[0].truth)
    assert (first.leaves[0].truth != other.leaves[0].truth).any()


def test_of_an_impure_function_nothing_else_is_judged():
    calls = []

    def counted(x):
        calls.append(None)
        return len(calls) * x

    audit = bh.check(counted, jnp.ones(3))
    assert [(f.check, f.passed) for f in audit.findings if not f.skipped] == [("purity", False)]
    assert "not judged" in str(audit)
    assert (audit.leaves, audit.cost) == ((), None)


def test_what_a_point_cannot_show_is_a_note(unchecked):
    audit = bh.check(lambda x, g, b: x * g + b, jnp.arange(3.0), jnp.ones(3), jnp.zeros(3))
    (note,) = [found for found in audit.findings if found.check == "point"]
    assert audit.passed and note.skipped
    assert note.message.startswith("g is 1, b is 0 everywhere: what a rule forgets of it may not")
