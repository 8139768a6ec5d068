"""One entry for two ways to a gradient: an objective and JAX, or two functions."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import labels, normal, spread

BATCH = {"inputs": normal(0, 8, 6), "targets": labels(1, 3, 8)}
LOSS = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
PARAMS = spread(LOSS.init(jax.random.key(0), BATCH))


def test_an_objective_is_compared_with_jax():
    report = bh.compare(LOSS, PARAMS, BATCH)
    assert report.agrees
    assert report.names == ("manual", "automatic")
    assert [row.path for row in report.rows] == ["b", "w"]


def test_two_functions_are_compared_with_each_other():
    report = bh.compare(jnp.tanh, lambda x: jnp.sinh(x) / jnp.cosh(x), normal(0, 5))
    assert report.agrees
    assert report.names == ("tanh", "<lambda>")
    assert [row.path for row in report.rows] == ["x"]


def test_an_objective_is_compared_with_another_loss():
    def loss(params, batch):
        logits = batch["inputs"] @ params["w"] + params["b"][None]
        chosen = jnp.take_along_axis(logits, batch["targets"][:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, 1) - chosen)

    report = bh.compare(LOSS, loss, PARAMS, BATCH)
    assert report.agrees, str(report)
    assert [row.path for row in report.rows] == ["params/b", "params/w"]


def test_a_comparison_says_how_a_gradient_is_wrong():
    wrong = bh.compare(lambda x: jnp.sum(x**2), lambda x: jnp.sum(x**2) / 4, normal(0, 4, 2))
    (row,) = wrong.rows
    assert (row.agrees, row.cause.kind) == (False, "mean")
    assert row.cause.message in str(wrong)
    assert row.gradients[0].shape == row.gradients[1].shape


def test_what_cannot_be_compared_is_refused(unchecked, nothing_compiles):
    short = BATCH | {"targets": jax.device_get(BATCH["targets"])[:7]}
    with nothing_compiles():
        with pytest.raises(TypeError, match=r"made by bh\.objective\(model, loss\); got Layer"):
            bh.compare(bh.dense(3), PARAMS, BATCH)
        with pytest.raises(
            TypeError, match=r"compare\(f, g, \*args\).*got the function .* and None"
        ):
            bh.compare(lambda x: x)
        with pytest.raises(TypeError, match=r"second function .* sin, got an array \(8, 6\)"):
            bh.compare(jnp.sin, BATCH["inputs"])
        with pytest.raises(TypeError, match=r"takes params and a batch, got 1 arguments"):
            bh.compare(LOSS, PARAMS)
        with pytest.raises(ValueError, match="rtol must be 0 or more, got -1"):
            bh.compare(LOSS, PARAMS, BATCH, rtol=-1)
        with pytest.raises(ValueError, match="one common first axis"):
            bh.compare(LOSS, PARAMS, short)
        with pytest.raises(ValueError, match="returns must be one of value"):
            bh.compare(jnp.sin, jnp.cos, normal(0, 3), returns="grads")
