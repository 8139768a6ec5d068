"""The rule updates what it should, and nothing where a number would cease to be finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import backhand as bh
from tests.support import assert_close, assert_identical, normal
from tests.training.common import NOISY, OBJECTIVE, batch, begin, one_step

LOSS = bh.losses.softmax_cross_entropy
NORMALIZED = bh.objective(bh.chain(bh.dense(6), bh.batch_norm(), bh.relu(), bh.dense(3)), LOSS)


def test_weight_decay_masks_of_optax_work(x64):
    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    for mask in (matrices, matrices(begin(optax.sgd(1.0)).params)):
        decayed = optax.adamw(1e-2, weight_decay=0.5, mask=mask)
        before, state, _ = one_step(decayed)
        _, plain, _ = one_step(optax.adam(1e-2))
        for name in ("hidden", "out"):
            assert_close(state.params[name]["b"], plain.params[name]["b"])
            shrunk = plain.params[name]["w"] - 1e-2 * 0.5 * before[name]["w"]
            assert_close(state.params[name]["w"], shrunk)


def test_weight_decay_masks_work_beside_frozen_parameters_and_running_statistics():
    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    for mask in (matrices, matrices(begin(optax.sgd(1.0), NOISY).params)):
        optimizer = optax.adamw(0.1, weight_decay=0.5, mask=mask)
        state = begin(optimizer, NOISY, frozen=["0/*"], key=jax.random.key(0))
        before, state, _ = one_step(optimizer, NOISY, state=state, frozen=["0/*"])
        assert np.array_equal(before[0]["w"], state.params[0]["w"])
        assert not np.array_equal(before[4]["w"], state.params[4]["w"])


def test_the_average_follows_the_parameters(x64):
    optimizer = optax.sgd(0.5)
    state = begin(optimizer, ema_decay=0.8)
    average = jax.tree.map(jnp.copy, state.params)
    step = bh.train_step(OBJECTIVE, optimizer)
    for seed in range(4):
        state, _ = step(state, batch(seed))
        average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, state.params)
    assert_close(state.average.params, average)


def sick(*rows):
    data = {**batch(), "weights": jnp.ones(8)}
    return {**data, "inputs": data["inputs"].at[jnp.asarray(rows)].set(jnp.nan)}


def test_a_step_that_is_not_finite_is_skipped_by_choice():
    optimizer = optax.adam(1e-2)
    state = begin(optimizer, ema_decay=0.5)
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state, state.average))
    _, state, metrics = one_step(optimizer, state=state, data=sick(3), nonfinite="skip")
    assert_identical((state.params, state.opt_state, state.average), kept)
    assert (int(metrics["skipped"]), int(state.step)) == (1, 1)
    before, state, metrics = one_step(optimizer, state=state, nonfinite="skip")
    assert int(metrics["skipped"]) == 0
    assert not np.array_equal(before["out"]["w"], state.params["out"]["w"])


def test_what_is_not_finite_is_kept_by_default():
    _, state, metrics = one_step(data=sick(3))
    assert jnp.isnan(metrics["loss"])
    assert jnp.isnan(state.params["out"]["w"]).any()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("nonfinite", ["drop", "skip"])
def test_the_state_stays_finite_whatever_comes(accumulate, nonfinite):
    optimizer = optax.adamw(1e-2)
    settings = {"accumulate": accumulate, "nonfinite": nonfinite}
    state = begin(optimizer, NOISY, key=jax.random.key(0), ema_decay=0.9)
    step = bh.train_step(NOISY, optimizer, **settings)
    for data in (
        sick(0),
        sick(*range(8)),
        {**batch(), "inputs": 1e30 * batch()["inputs"]},
        batch(),
    ):
        state, _ = step(state, data)
        numbers = state._replace(key=None)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers))


LINEAR = bh.objective(bh.dense(1), bh.losses.mean_squared_error)


@pytest.mark.parametrize("nonfinite", ["drop", "skip"])
@pytest.mark.parametrize(
    ("optimizer", "size"),
    [(optax.adam(1e-3), 1e12), (optax.sgd(1e38), 1e3)],
    ids=["square", "step"],
)
def test_a_finite_gradient_that_would_break_the_state_is_skipped(nonfinite, optimizer, size):
    """Its square overflows, or the rule's step does."""
    data = {"inputs": normal(0, 8, 4), "targets": normal(1, 8, 1)}
    state = bh.train_state(LINEAR.init(jax.random.key(0), data), optimizer)
    kept = jax.tree.map(np.asarray, state._replace(step=0))
    step = bh.train_step(LINEAR, optimizer, nonfinite=nonfinite)
    state, metrics = step(state, {**data, "inputs": size * data["inputs"]})
    assert_identical(state._replace(step=0), kept)
    assert int(metrics["skipped"]) == 1


def test_looking_before_updating_costs_less_memory_than_choosing_after():
    wide = bh.objective(bh.dense(512), bh.losses.mean_squared_error)
    data = {"inputs": normal(0, 4, 512), "targets": normal(1, 4, 512)}
    state = bh.train_state(wide.init(jax.random.key(0), data), optax.adamw(1e-3))

    def gradients(**settings):
        lowered = bh.train_step(wide, optax.adamw(1e-3), **settings).jitted.lower(state, data)
        used = lowered.compile().memory_analysis().temp_size_in_bytes
        return used / state.params["w"].nbytes

    assert gradients(nonfinite="skip") < gradients() + 1.1  # of 3 that the state takes


# Rules that ask for more --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2),
    ],
    ids=["l-bfgs", "line search", "sam"],
)
def test_a_rule_that_asks_for_more_works_beside_what_it_may_not_touch(rule):
    state = begin(rule, NORMALIZED, frozen=["0/*"])
    step = bh.train_step(NORMALIZED, rule, frozen=["0/*"], nonfinite="skip")
    start, losses = jax.tree.map(np.asarray, state.params), []
    for _ in range(4):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert int(metrics["skipped"]) == 0
    assert losses[-1] < losses[0]
    assert_identical(state.params[0], start[0])
    assert not np.array_equal(state.params[1]["running"].mean, start[1]["running"].mean)


def test_a_rule_that_is_given_what_it_may_not_touch_does_not_see_it():
    """Frozen, L-BFGS takes the steps that it takes for the other parameters alone."""
    other = bh.objective(bh.chain(bh.freeze(bh.dense(6)), bh.tanh(), bh.dense(3)), LOSS)
    plain = bh.objective(bh.chain(bh.dense(6), bh.tanh(), bh.dense(3)), LOSS)
    ends = []
    for objective, frozen in ((other, ()), (plain, ("0/*",))):
        state = begin(optax.lbfgs(), objective, frozen=frozen)
        step = bh.train_step(objective, optax.lbfgs(), frozen=frozen)
        for _ in range(3):
            state, _ = step(state, batch())
        ends.append(state.params[2])
    assert_close(*ends, 1e-4)


class Seen(NamedTuple):
    """A loss with its gradient: what a rule is told, and what it finds by `value_fn`."""

    told: Any
    found: Any


def note(updates, state, params, *, value, grad, value_fn, **_):
    found = jax.value_and_grad(value_fn)(params)
    return jax.tree.map(jnp.zeros_like, updates), Seen((value, grad), found)


NOTING = optax.GradientTransformationExtraArgs(
    lambda params: Seen(*[(jnp.zeros(()), params)] * 2), note
)


def noted(state):
    return [optax.tree.get(state.opt_state, name) for name in Seen._fields]


@pytest.mark.parametrize("options", [{"nonfinite": "drop"}, {"clip_example_norm": 1e9}])
def test_the_loss_as_a_function_is_that_of_the_step(x64, options):
    """The same micro-batches with the same noise, and without those that are dropped."""
    data = sick(2) if "nonfinite" in options else batch()
    options = {**options, "accumulate": 4}
    state = begin(NOTING, NOISY, key=jax.random.key(3))
    _, state, metrics = one_step(NOTING, NOISY, data, state, **options)
    told, found = noted(state)
    assert np.isfinite(told[0]) and metrics.get("skipped", 0) == 0
    assert_close(found, told)


def test_the_gradient_of_the_loss_as_a_function_is_not_clipped(x64):
    _, state, _ = one_step(NOTING, clip_example_norm=1e-3)
    (_, clipped), (_, whole) = noted(state)
    assert float(optax.tree.norm(whole)) > 10 * float(optax.tree.norm(clipped))


def test_a_step_that_overflows_is_not_the_best():
    """Left out, what overflows would have a loss of 0."""
    rule = optax.chain(optax.sgd(1e5), optax.scale_by_backtracking_linesearch(40))
    objective = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
    data = {"inputs": normal(0, 8, 3), "targets": normal(1, 8, 1)}
    params = objective.init(jax.random.key(0), data)
    state = bh.train_state(params, rule, loss_scale=2.0**8)
    step = bh.train_step(objective, rule, accumulate=4, dtype=jnp.float16, nonfinite="drop")
    for _ in range(2):
        state, metrics = step(state, data)
    assert int(metrics["dropped"]) == 0 and float(metrics["loss"]) > 0
