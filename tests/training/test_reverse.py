"""What is not learned costs nothing; a loss scale leaves the gradient as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, assert_identical, labels, normal
from tests.training.common import (
    FROZEN,
    NOISY,
    OBJECTIVE,
    batch,
    begin,
    combined,
    gradient,
    one_step,
    stacked,
    updates,
)


@pytest.mark.parametrize("settings", [{}, {"gradients": "automatic"}, {"accumulate": 4}], ids=str)
def test_frozen_parameters_keep_every_bit(settings):
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    params = OBJECTIVE.init(jax.random.key(0), batch())
    params["hidden"]["b"] = -jnp.zeros(6)  # a negative zero plus zero is another number
    state = bh.train_state(params, optimizer, frozen=FROZEN, ema_decay=0.9)
    step = bh.train_step(OBJECTIVE, optimizer, frozen=FROZEN, **settings)
    for _ in range(3):
        state, metrics = step(state, batch())
    for tree in (state.params, state.average.params):
        assert (
            np.asarray(tree["hidden"]["w"]).tobytes() == np.asarray(params["hidden"]["w"]).tobytes()
        )
        assert np.asarray(tree["out"]["b"]).tobytes() == np.asarray(params["out"]["b"]).tobytes()
    assert np.signbit(state.params["hidden"]["b"]).all()
    assert not np.array_equal(state.params["out"]["w"], params["out"]["w"])
    assert float(metrics["gradient_norm"]) > 0


def test_frozen_parameters_do_not_change_how_the_others_are_trained(x64):
    before, state, metrics = one_step(frozen=FROZEN, state=begin(optax.sgd(1.0), frozen=FROZEN))
    free = gradient(before)["out"]["w"]
    assert_close(updates(before, state)["out"]["w"], free)
    assert_close(metrics["gradient_norm"], optax.tree.norm(free))


def test_frozen_parameters_have_no_part_in_the_norm_of_an_example(x64):
    state = begin(optax.sgd(1.0), frozen=FROZEN)
    before, state, _ = one_step(frozen=FROZEN, state=state, clip_example_norm=0.3)

    def total(weight, example):
        params = {**before, "out": {**before["out"], "w": weight}}
        one = jax.tree.map(lambda leaf: leaf[None], example)
        return OBJECTIVE.forward(params, one)[0].total

    each = jax.vmap(jax.grad(total), (None, 0))(before["out"]["w"], batch())
    clipped, _ = optax.per_example_global_norm_clip(each, 0.3)
    truth = clipped / jnp.sum(batch()["weights"])
    assert_close(updates(before, state)["out"]["w"], truth, 1e-9)


def test_frozen_running_statistics_stay_as_they_are():
    for frozen, moves in ((["1/scale"], True), (["1/*"], False)):
        state = begin(optax.sgd(1.0), NOISY, frozen=frozen, key=jax.random.key(0))
        before, state, _ = one_step(objective=NOISY, frozen=frozen, state=state)
        running = state.params[1]["running"]
        assert np.array_equal(before[1]["running"].mean, running.mean) is not moves


WIDE = bh.objective(
    bh.chain(bh.dense(256), bh.relu(), bh.dense(256), bh.relu(), bh.dense(256)),
    bh.losses.softmax_cross_entropy,
)


@functools.cache
def flops(frozen, **settings):
    """Of one step of three 256-wide layers at a batch of 1024, in products of 1024 x 256 x 256.

    Micro-batches are so large that none waits for another, which would be a loop within the loop;
    no weight is large enough beside the others to be summed in blocks.
    """
    data = {"inputs": normal(0, 1024, 256), "targets": labels(1, 256, 1024)}
    state = bh.train_state(WIDE.init(jax.random.key(0), data), optax.sgd(0.1), frozen=frozen)
    step = bh.train_step(WIDE, optax.sgd(0.1), frozen=frozen, **settings)
    cost = step.jitted.lower(state, data).compile().cost_analysis()["flops"]
    # XLA counts the body of a loop once: a quarter of the batch, where there are four parts.
    return cost * settings.get("accumulate", 1) / (2 * 1024 * 256 * 256)


@pytest.mark.parametrize("settings", [{}, {"gradients": "automatic"}, {"accumulate": 4}], ids=str)
def test_the_reverse_work_of_frozen_parameters_is_gone(settings):
    # Forward 3, errors 2, weights 3.
    assert int(flops((), **settings)) == 8
    # Behind frozen layers no error is needed either: forward 3, weights 1.
    assert int(flops(("0/*", "2/*"), **settings)) == 4
    # In front of them it is: forward 3, errors 2, weights 1.
    assert int(flops(("2/*", "4/*"), **settings)) == 6


def test_the_work_is_gone_when_examples_are_clipped_or_parts_dropped():
    for settings in ({"clip_example_norm": 1.0}, {"accumulate": 4, "nonfinite": "drop"}):
        assert flops(("0/*", "2/*"), **settings) < 0.6 * flops((), **settings)


def sick(*rows):
    data = {**batch(), "weights": jnp.ones(8)}
    return {**data, "inputs": data["inputs"].at[jnp.asarray(rows)].set(jnp.nan)}


def test_micro_batches_that_are_not_finite_are_dropped_by_choice(x64):
    before, state, metrics = one_step(data=sick(1, 6), accumulate=4, nonfinite="drop")
    healthy = jnp.asarray([row for row in range(8) if row % 4 not in (1, 2)])
    kept = jax.tree.map(lambda leaf: leaf[healthy], sick(1, 6))
    assert_close(updates(before, state), gradient(before, kept))
    assert int(metrics["dropped"]) == 2
    assert_close(metrics["loss"], OBJECTIVE(before, kept))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_without_weight_is_counted_and_teaches_nothing(accumulate):
    data = {**batch(), "weights": jnp.zeros(8)}
    before, state, metrics = one_step(data=data, accumulate=accumulate)
    assert_identical(before, state.params)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 0,
        "gradient_norm": 0,
        "accuracy": 0,
        "empty": 1,
    }
    assert int(state.step) == 1
    assert int(one_step()[2]["empty"]) == 0


# Any objective ------------------------------------------------------------------------------------


def by_hand(metrics=()):
    """The sum of squares of a linear map, its reverse pass written out."""

    def forward(params, batch, *, key=None, training=True):
        error = batch["inputs"] @ params - batch["targets"][:, None].astype(params.dtype)
        count = jnp.full((), len(error), error.dtype)
        return bh.Terms(
            jnp.sum(error**2), count, {name: bh.metrics.Sum(count) for name in metrics}
        ), (batch["inputs"], error)

    def backward(
        params, residuals, dtotal, batch, collect=bh.gradients, *, key=None, training=True
    ):
        x, error = residuals

        def rule(params, x, dy):
            return bh.Outer(x, dy), None

        return collect(bh.Visit(params, x, 2 * error * dtotal, rule))[0]

    return bh.Objective(lambda key, batch: jnp.ones((4, 1)), forward, backward)


@pytest.mark.parametrize("make", [combined, by_hand])
def test_any_objective_trains_as_by_automatic_gradients(x64, make):
    of = make()
    truth = one_step(objective=of, gradients="automatic")
    assert_close(one_step(objective=of, accumulate=2, gradients="manual"), truth, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"nonfinite": "drop"}, {"nonfinite": "skip", "clip_example_norm": 1.0}],
    ids=["drop", "skip"],
)
def test_several_objectives_train_with_every_option(settings):
    of, optimizer, frozen = combined(), optax.adam(0.01), ["hidden/*"]
    state = begin(optimizer, of, frozen=frozen, loss_scale=2.0**10)
    start = jax.tree.map(np.asarray, state.params)
    step = bh.train_step(
        of,
        optimizer,
        accumulate=2,
        clip_layer_norm=1.0,
        dtype=jnp.float16,
        frozen=frozen,
        steps_per_call=2,
        **settings,
    )
    state, metrics = step(state, stacked(2))
    total = metrics["plain"] + 0.5 * metrics["smooth"]
    assert np.abs(metrics["loss"] - total).max() < 1e-5
    assert (int(state.step), metrics["skipped"].tolist()) == (2, [0, 0])
    assert_identical(state.params["hidden"], start["hidden"])
    assert not np.array_equal(state.params["out"]["w"], start["out"]["w"])


def test_a_metric_cannot_take_the_name_of_what_the_step_reports(nothing_compiles):
    of = by_hand(metrics=["dropped"])
    state, data = begin(optax.sgd(0.1), of, loss_scale=8.0), batch()
    step = bh.train_step(of, optax.sgd(0.1), accumulate=2, nonfinite="drop")
    with nothing_compiles(), pytest.raises(ValueError, match="may be named 'dropped'"):
        step(state, data)


def with_an_integer():
    """A linear map that keeps a count beside its weight."""

    def rule(params, x, dy):
        return {"n": None, "w": bh.Outer(x, dy)}, dy @ params["w"].T

    layer = bh.layer(
        "counted",
        lambda key, x: {"n": jnp.arange(3), "w": jnp.ones((x.shape[-1], 3))},
        lambda params, x: (x @ params["w"], x),
        rule,
    )
    return bh.objective(layer, bh.losses.softmax_cross_entropy)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradients": "automatic", "frozen": ["n"]},
        {"accumulate": 2, "nonfinite": "drop", "steps_per_call": 2},
        {"clip_example_norm": 1.0, "clip_layer_norm": 1.0},
    ],
    ids=str,
)
def test_an_integer_parameter_stays_as_it_is(settings):
    of, optimizer = with_an_integer(), optax.adamw(0.1)
    params, frozen = of.init(jax.random.key(0), batch()), settings.get("frozen", ())
    state = bh.train_state(params, optimizer, frozen=frozen, ema_decay=0.9)
    data = stacked(2) if "steps_per_call" in settings else batch()
    state, _ = bh.train_step(of, optimizer, **settings)(state, data)
    for tree in (state.params, state.average.params):
        assert_identical(tree["n"], jnp.arange(3))
        assert not np.array_equal(tree["w"], params["w"])
