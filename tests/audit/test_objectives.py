"""An objective's gradient beside JAX's: right ones pass, of a wrong one the leaf is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import labels, normal, spread


def planted(change, inner=None):
    """A dense layer whose gradients of (w, b) are changed."""
    inner = inner or bh.dense(5)

    def rule(params, x, dy):
        grads, dx = inner.backward(params, x, dy)
        return change(grads), dx

    return bh.layer("planted", inner.init, inner.forward, rule)


def model(change=None):
    middle = bh.dense(5) if change is None else planted(change)
    return bh.chain(
        stem=bh.dense(4), act=bh.tanh(), middle=middle, again=bh.gelu(), head=bh.dense(3)
    )


BATCH = {"inputs": normal(0, 16, 6), "targets": labels(1, 3, 16)}


def compared(layer, batch=BATCH, **settings):
    objective = bh.objective(layer, bh.losses.softmax_cross_entropy)
    params = spread(objective.init(jax.random.key(0), batch))
    return bh.compare(objective, params, batch, **settings)


WRONG = {
    "sign": lambda g: {**g, "w": -g["w"]},
    "factor": lambda g: {**g, "w": 1.001 * g["w"]},
    "zero": lambda g: {**g, "w": 0 * g["w"]},
    "one element": lambda g: {**g, "w": g["w"].at[2, 1].add(1e-3)},
    "nan": lambda g: {**g, "w": g["w"].at[2, 1].set(jnp.nan)},
    "infinite": lambda g: {**g, "w": g["w"].at[2, 1].set(-jnp.inf)},
}


def test_a_right_gradient_passes():
    report = compared(model())
    assert report.agrees
    report.assert_close()
    assert [row.path for row in report.rows] == [
        f"{layer}/{leaf}" for layer in ("stem", "middle", "head") for leaf in ("b", "w")
    ]
    assert all(row.relative < report.tolerance and row.cosine > 0.999 for row in report.rows)
    assert report.values[0] == pytest.approx(report.values[1])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_leaf_is_named(name):
    report = compared(model(WRONG[name]))
    assert [row.path for row in report.rows if not row.agrees] == ["middle/w"]
    assert not report.agrees
    (row,) = (row for row in report.rows if not row.agrees)
    assert row.shape == (4, 5)
    if name in ("one element", "nan", "infinite"):
        assert row.where == (2, 1)
    if name in ("nan", "infinite"):
        assert "NaN or Inf" in row.note
    if name == "sign":
        assert row.cosine == pytest.approx(-1)
    if name == "factor":
        assert row.norm_ratio == pytest.approx(1.001, abs=1e-5)
    if name == "zero":
        assert (row.norm_ratio, row.relative) == (0, 1)
    with pytest.raises(AssertionError, match=r"(?s)middle/w.*DIFFERS.*DIFFER in 1 of 6 leaves"):
        report.assert_close()


def test_swapped_leaves_are_both_named():
    swap = planted(lambda g: {"scale": g["offset"], "offset": g["scale"]}, bh.layer_norm())
    report = compared(bh.chain(stem=bh.dense(4), norm=swap, act=bh.gelu(), head=bh.dense(3)))
    wrong = [row.path for row in report.rows if not row.agrees]
    assert wrong == ["norm/offset", "norm/scale"]


def test_an_error_before_the_wrong_layer_is_blamed_on_all_it_reaches():
    inner = bh.dense(5)

    def rule(params, x, dy):
        grads, dx = inner.backward(params, x, dy)
        return grads, 1.01 * dx

    layer = bh.layer("planted", inner.init, inner.forward, rule)
    report = compared(bh.chain(stem=bh.dense(4), middle=layer, head=bh.dense(3)))
    assert [row.path for row in report.rows if not row.agrees] == ["stem/b", "stem/w"]


def test_a_true_gradient_of_zero_is_rounding_and_says_so():
    """A bias before a normalization has no effect: what is left of its gradient is rounding."""
    layer = bh.chain(stem=bh.dense(4), norm=bh.batch_norm(), act=bh.relu(), head=bh.dense(3))
    report = compared(layer)
    assert report.agrees, str(report)
    bias = next(row for row in report.rows if row.path == "stem/b")
    assert bias.relative > report.tolerance
    assert "rounding: in float64 the two differ by" in bias.note
    assert "running/mean" in str(report)


def test_rounding_is_no_excuse_for_a_wrong_gradient():
    inner = bh.dense(4)
    wrong = planted(lambda g: {**g, "b": g["b"] + 1e-4}, inner)
    report = compared(bh.chain(stem=wrong, norm=bh.batch_norm(), act=bh.relu(), head=bh.dense(3)))
    assert [row.path for row in report.rows if not row.agrees] == ["stem/b"]


def test_a_bfloat16_model_agrees_at_its_own_tolerance():
    layer = bh.chain(low=bh.cast(jnp.bfloat16), stem=bh.dense(8), act=bh.gelu(), head=bh.dense(3))
    report = compared(layer)
    assert report.agrees, str(report)
    assert 0.01 < report.tolerance < 0.2
    assert {row.dtype for row in report.rows} == {"float32"}
    wrong = compared(
        bh.chain(
            low=bh.cast(jnp.bfloat16),
            stem=bh.dense(4),
            **{"middle": planted(lambda g: {**g, "w": -g["w"]}), "head": bh.dense(3)},
        )
    )
    assert [row.path for row in wrong.rows if not row.agrees] == ["middle/w"]


def test_float64_is_compared_in_float64(x64):
    batch = BATCH | {"inputs": normal(0, 16, 6)}
    report = compared(model(), batch)
    assert report.agrees
    assert report.tolerance < 1e-9
    slightly = compared(model(lambda g: {**g, "w": (1 + 1e-7) * g["w"]}), batch)
    assert [row.path for row in slightly.rows if not row.agrees] == ["middle/w"]


def test_dropout_and_evaluation_are_compared_under_the_same_masks():
    layer = bh.chain(bh.dense(4), bh.dropout(0.5), bh.batch_norm(), bh.dense(3))
    assert compared(layer, key=jax.random.key(1)).agrees
    assert compared(layer, training=False).agrees


def test_a_wrong_loss_value_is_a_difference_too():
    objective = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
    params = spread(objective.init(jax.random.key(0), BATCH))
    report = bh.compare(objective, params, BATCH)
    other = dataclasses.replace(report, values=(1.0, 1.1), outputs_agree=False)
    assert (report.agrees, other.agrees) == (True, False)
    assert "the values DIFFER: manual 1.0, automatic 1.1" in str(other)


def test_what_cannot_be_compared_is_refused(unchecked, nothing_compiles):
    objective = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
    params = {"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)}
    short = BATCH | {"targets": jax.device_get(BATCH["targets"])[:7]}
    with nothing_compiles():
        with pytest.raises(TypeError, match=r"made by bh\.objective\(model, loss\); got Layer"):
            bh.compare(bh.dense(3), params, BATCH)
        with pytest.raises(ValueError, match="rtol must be 0 or more, got -1"):
            bh.compare(objective, params, BATCH, rtol=-1)
        with pytest.raises(ValueError, match="one common first axis"):
            bh.compare(objective, params, short)


def scaled_weight(factor):
    """A gradient of w that is off by a factor."""
    return planted(lambda grads: {**grads, "w": factor * grads["w"]})


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_five_percent_are_noticed_even_in_bfloat16(factor):
    head = bh.chain(bh.cast(jnp.bfloat16), bh.dense(5), bh.tanh(), scaled_weight(factor))
    right = bh.chain(bh.cast(jnp.bfloat16), bh.dense(5), bh.tanh(), bh.dense(5))
    assert compared(right).agrees
    assert [row.path for row in compared(head).rows if not row.agrees] == ["3/w"]


def test_a_rule_that_loses_its_digits_is_wrong_although_it_is_right_in_float64():
    def cancels(grads):
        large = jax.lax.optimization_barrier(grads["w"] + 1e6)
        return {**grads, "w": large - 1e6}

    report = compared(bh.chain(bh.dense(5), bh.tanh(), planted(cancels)))
    assert [row.path for row in report.rows if not row.agrees] == ["2/w"]


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_numpy_batches_of_any_width_are_settled_in_float64(dtype):
    """A bias before a norm is all rounding, which sends the comparison to float64."""
    inputs = np.asarray(BATCH["inputs"], np.float64)
    batch = {"inputs": inputs, "targets": np.asarray(BATCH["targets"], dtype)}
    report = compared(bh.chain(bh.dense(8), bh.batch_norm(), bh.relu(), bh.dense(3)), batch)
    assert report.agrees
    assert not compared(model(lambda grads: {**grads, "w": -grads["w"]}), batch).agrees


def test_a_sign_is_noticed_where_the_inputs_are_a_hundred_thousand_times_smaller():
    """Each element is held against its own terms, not against the largest of its leaf."""
    inner = bh.dense(3)

    def rule(params, x, dy):
        grads, dx = inner.backward(params, x, dy)
        return {**grads, "w": grads["w"].at[0].multiply(-1)}, dx

    layer = bh.layer("first row", inner.init, inner.forward, rule)
    small = {**BATCH, "inputs": BATCH["inputs"].at[:, 0].multiply(1e-5)}
    report = compared(layer, small)
    (row,) = (row for row in report.rows if not row.agrees)
    assert (row.path, row.where[0], row.cause.kind) == ("w", 0, "block")
    assert compared(inner, small).agrees
