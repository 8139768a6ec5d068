"""Activations of another dtype, and the loss scale that float16 needs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from backhand.training import LossScale
from tests.support import assert_close, assert_identical, labels
from tests.training.common import OBJECTIVE, batch, begin, combined, gradient, one_step


def products(objective, data, **settings):
    """The dtypes of the factors of every matrix product of a step, as it is lowered."""
    state = bh.train_state(
        objective.init(jax.random.key(0), data), optax.sgd(0.1), loss_scale=2.0**10
    )
    lowered = bh.train_step(objective, optax.sgd(0.1), **settings).jitted.lower(state, data)
    return set(
        re.findall(r"dot_general.* : \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>", lowered.as_text())
    )


IDS = {"inputs": labels(0, 7, 4, 5), "targets": labels(1, 3, 4, 5)}


def of_ids(*layers):
    return bh.objective(
        bh.chain(*layers, bh.dense(8), bh.relu(), bh.dense(3)), bh.losses.softmax_cross_entropy
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_product_is_computed_in_the_dtype_of_the_activations(dtype):
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert products(OBJECTIVE, batch(), dtype=dtype, accumulate=2) == {(short, short)}
    for embedded in ([bh.embedding(7, 4, dtype=dtype)], [bh.embedding(7, 4), bh.cast(dtype)]):
        assert products(of_ids(*embedded), IDS, dtype=dtype) == {(short, short)}


def test_a_dtype_that_nothing_would_be_computed_in_is_refused(nothing_compiles):
    objective = of_ids(bh.embedding(7, 4))
    state = bh.train_state(objective.init(jax.random.key(0), IDS), optax.sgd(0.1))
    step = bh.train_step(objective, optax.sgd(0.1), dtype=jnp.bfloat16)
    message = r"bh\.embedding\(vocabulary, features, dtype=jnp\.bfloat16\)"
    with nothing_compiles(), pytest.raises(ValueError, match=message):
        step(state, IDS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_sums_and_losses_stay_in_float32(dtype):
    optimizer = optax.adam(1e-2)
    state = begin(optimizer, loss_scale=2.0**10)
    before, state, metrics = one_step(optimizer, state=state, dtype=dtype, accumulate=2)
    moments = state.opt_state[0]
    for tree in (state.params, moments.mu, moments.nu, metrics["loss"]):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    ours = jax.tree.map(lambda m: m / 0.1, moments.mu)
    assert_close(ours, gradient(before), 0.05)


@pytest.mark.parametrize(
    ("accumulate", "objective", "ways"),
    [
        (1, OBJECTIVE, ("keep", "drop")),
        (4, OBJECTIVE, ("keep", "drop")),
        (4, combined(), ("drop",)),
    ],
    ids=["1", "4", "4, two terms"],
)
def test_the_loss_scale_is_taken_out_of_the_gradient(x64, accumulate, objective, ways):
    given = {"objective": objective, "accumulate": accumulate}
    _, plain, _ = one_step(**given)
    for nonfinite in ways:
        state = begin(optax.sgd(1.0), loss_scale=2.0**7)
        _, scaled, metrics = one_step(state=state, nonfinite=nonfinite, **given)
        assert_close(scaled.params, plain.params)
        assert (float(metrics["loss_scale"]), int(metrics["skipped"])) == (128, 0)


def test_what_is_dropped_lowers_the_scale_too():
    data = {**batch(), "weights": jnp.ones(8)}
    sick = {**data, "inputs": data["inputs"].at[1].set(jnp.inf)}
    state = begin(optax.sgd(0.1), loss_scale=8.0)
    _, state, metrics = one_step(
        optax.sgd(0.1), state=state, data=sick, accumulate=4, nonfinite="drop"
    )
    assert (int(metrics["dropped"]), int(metrics["skipped"])) == (1, 0)
    assert float(state.loss_scale.scale) == 4


def test_a_step_that_overflows_halves_the_scale_and_changes_nothing_else():
    optimizer = optax.adam(1e-2)
    state = begin(optimizer, ema_decay=0.9, loss_scale=2.0**24)
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state, state.average))
    step = bh.train_step(OBJECTIVE, optimizer, dtype=jnp.float16)
    scales, skipped = [], []
    for _ in range(16):
        state, metrics = step(state, batch())
        scales.append(float(metrics["loss_scale"]))
        skipped.append(int(metrics["skipped"]))
        if skipped[-1]:
            assert_identical((state.params, state.opt_state, state.average), kept)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    overflows = sum(skipped)
    assert 0 < overflows < 16
    assert scales == [2.0 ** (24 - min(n, overflows)) for n in range(16)]
    assert int(state.step) == 16
    assert not np.array_equal(state.params["out"]["w"], kept[0]["out"]["w"])


def test_the_loss_scale_grows_again_after_its_patience():
    state = begin(optax.sgd(0.1), loss_scale=8.0)
    fresh = LossScale(state.loss_scale.scale, state.loss_scale.good_steps, patience=3)
    state = state._replace(loss_scale=fresh)
    step = bh.train_step(OBJECTIVE, optax.sgd(0.1))
    scales = []
    for _ in range(7):
        state, metrics = step(state, batch())
        scales.append(float(metrics["loss_scale"]))
    assert scales == [8, 8, 8, 16, 16, 16, 32]
