"""Every option of the step does what it says, and nothing else."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from backhand.training import LossScale
from tests.support import assert_close, assert_identical, labels, normal, spread

MODEL = bh.chain(hidden=bh.dense(6), act=bh.tanh(), out=bh.dense(3))
OBJECTIVE = bh.objective(
    MODEL, bh.losses.softmax_cross_entropy, metrics={"accuracy": bh.metrics.accuracy}
)
# An objective with everything that a state can carry: noise and running statistics.
NOISY = bh.objective(
    bh.chain(bh.dense(6), bh.batch_norm(), bh.relu(), bh.dropout(0.3), bh.dense(3)),
    bh.losses.softmax_cross_entropy,
)


def batch(seed=0, rows=8):
    weights = np.random.default_rng(seed + 2).integers(0, 3, rows)
    return {
        "inputs": normal(seed, rows, 4),
        "targets": labels(seed + 1, 3, rows),
        "weights": jnp.asarray(weights, jnp.result_type(float)),
    }


def stacked(steps, start=0):
    parts = [batch(10 * seed) for seed in range(start, start + steps)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def begin(optimizer, objective=OBJECTIVE, **settings):
    params = spread(objective.init(jax.random.key(0), batch()))
    if objective is NOISY:
        params = objective.init(jax.random.key(0), batch())
    return bh.train_state(params, optimizer, **settings)


def one_step(optimizer=None, objective=OBJECTIVE, data=None, state=None, **settings):
    """(parameters before, state, metrics) of one step."""
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    state = begin(optimizer, objective) if state is None else state
    before = jax.tree.map(jnp.copy, state.params)
    step = bh.train_step(objective, optimizer, **settings)
    return before, *step(state, batch() if data is None else data)


def updates(before, state):
    """What the step subtracted from the parameters: with plain descent at rate 1, the gradient."""
    return jax.tree.map(jnp.subtract, before, state.params)


def gradient(params, data=None):
    return jax.jit(jax.grad(OBJECTIVE))(params, batch() if data is None else data)


# Clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.01, 100.0])
def test_the_whole_gradient_is_clipped_as_optax_does_it(x64, norm):
    before, state, metrics = one_step(clip_norm=norm, accumulate=3)
    plain = gradient(before)
    clipped, _ = optax.clip_by_global_norm(norm).update(plain, optax.EmptyState())
    assert_close(updates(before, state), clipped, 1e-9)
    assert_close(metrics["gradient_norm"], optax.tree.norm(plain))


def test_each_layer_is_clipped_on_its_own(x64):
    before, state, _ = one_step(clip_layer_norm=0.1)
    plain = gradient(before)
    clip = optax.clip_by_global_norm(0.1)
    truth = {name: clip.update(layer, optax.EmptyState())[0] for name, layer in plain.items()}
    assert_close(updates(before, state), truth, 1e-9)
    assert {name: bool(optax.tree.norm(plain[name]) > 0.1) for name in plain} == {
        "hidden": True,
        "act": False,
        "out": True,
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_example_is_clipped_on_its_own(x64, accumulate):
    before, state, metrics = one_step(clip_example_norm=1.5, accumulate=accumulate)

    def total(params, example):
        one = jax.tree.map(lambda leaf: leaf[None], example)
        return OBJECTIVE.forward(params, one)[0].total

    each = jax.vmap(jax.grad(total), (None, 0))(before, batch())
    clipped, count = optax.per_example_global_norm_clip(each, 1.5)
    weight = jnp.sum(batch()["weights"])
    assert_close(updates(before, state), jax.tree.map(lambda g: g / weight, clipped), 1e-9)
    share = float(count) / int(jnp.sum(batch()["weights"] > 0))
    assert 0 < share < 1
    assert abs(float(metrics["clipped"]) - share) < 1e-6


def test_clipping_by_example_then_by_norm_are_both_done(x64):
    before, state, _ = one_step(clip_example_norm=0.5, clip_norm=0.01)
    assert abs(float(optax.tree.norm(updates(before, state))) - 0.01) < 1e-9


# Frozen parameters and masks ----------------------------------------------------------------------

FROZEN = ["hidden/*", "out/b"]


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
    """Of one step of three 256-wide layers at a batch of 64, in products of 64 x 256 x 256."""
    data = {"inputs": normal(0, 64, 256), "targets": labels(1, 256, 64)}
    state = bh.train_state(WIDE.init(jax.random.key(0), data), optax.sgd(0.1), frozen=frozen)
    step = bh.train_step(WIDE, optax.sgd(0.1), frozen=frozen, **settings)
    cost = step.jitted.lower(state, data).compile().cost_analysis()["flops"]
    # XLA counts the body of a loop once: a quarter of the batch, where there are four parts.
    return cost * settings.get("accumulate", 1) / (2 * 64 * 256 * 256)


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


# Averages, precision and loss scale ---------------------------------------------------------------


def test_the_average_follows_the_parameters(x64):
    optimizer = optax.sgd(0.5)
    state = begin(optimizer, ema_decay=0.8)
    average = jax.tree.map(jnp.copy, state.params)
    step = bh.train_step(OBJECTIVE, optimizer)
    for seed in range(4):
        state, _ = step(state, batch(seed))
        average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, state.params)
    assert_close(state.average.params, average)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_activations_are_cast_and_parameters_are_not(dtype):
    seen = []

    def forward(params, x):
        seen.append(x.dtype)
        return x, ()

    spy = bh.layer("spy", lambda key, x: (), forward, lambda params, residuals, dy: ((), dy))
    objective = bh.objective(bh.chain(bh.dense(6), spy, bh.dense(3)), OBJECTIVE_LOSS)
    optimizer = optax.adam(1e-2)
    state = begin(optimizer, objective, loss_scale=2.0**10)
    seen.clear()
    before, state, metrics = one_step(optimizer, objective, state=state, dtype=dtype, accumulate=2)
    assert dtype in seen
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    moments = state.opt_state[0]
    assert {leaf.dtype for leaf in jax.tree.leaves((moments.mu, moments.nu))} == {
        jnp.dtype(jnp.float32)
    }
    assert metrics["loss"].dtype == jnp.float32
    truth = jax.grad(objective)(before, batch())
    ours = jax.tree.map(lambda m: m / 0.1, moments.mu)
    assert_close(ours, truth, 0.05)


OBJECTIVE_LOSS = bh.losses.softmax_cross_entropy


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_scale_is_taken_out_of_the_gradient(x64, accumulate):
    _, plain, _ = one_step(accumulate=accumulate)
    for nonfinite in ("keep", "drop"):
        state = begin(optax.sgd(1.0), loss_scale=2.0**7)
        _, scaled, metrics = one_step(state=state, accumulate=accumulate, nonfinite=nonfinite)
        assert_close(scaled.params, plain.params)
        assert (float(metrics["loss_scale"]), int(metrics["skipped"])) == (128, 0)


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


def test_what_is_dropped_lowers_the_scale_too():
    data = {**batch(), "weights": jnp.ones(8)}
    sick = {**data, "inputs": data["inputs"].at[1].set(jnp.inf)}
    state = begin(optax.sgd(0.1), loss_scale=8.0)
    _, state, metrics = one_step(
        optax.sgd(0.1), state=state, data=sick, accumulate=4, nonfinite="drop"
    )
    assert (int(metrics["dropped"]), int(metrics["skipped"])) == (1, 0)
    assert float(state.loss_scale.scale) == 4


# What is not finite, and what is empty ------------------------------------------------------------


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


def test_micro_batches_that_are_not_finite_are_dropped_by_choice(x64):
    before, state, metrics = one_step(data=sick(1, 6), accumulate=4, nonfinite="drop")
    healthy = jnp.asarray([row for row in range(8) if row % 4 not in (1, 2)])
    kept = jax.tree.map(lambda leaf: leaf[healthy], sick(1, 6))
    assert_close(updates(before, state), gradient(before, kept))
    assert int(metrics["dropped"]) == 2
    assert_close(metrics["loss"], OBJECTIVE(before, kept))


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


# Many steps in one call, seeds and the state ------------------------------------------------------


def many(optimizer, calls, steps, objective=NOISY, **settings):
    """(state, losses) after calls of steps, every step with its own batch."""
    state = begin(optimizer, objective, key=jax.random.key(7), ema_decay=0.9)
    step = bh.train_step(objective, optimizer, steps_per_call=steps, **settings)
    losses = []
    for call in range(calls):
        data = stacked(steps, call * steps)
        data = data if steps > 1 else jax.tree.map(lambda leaf: leaf[0], data)
        state, metrics = step(state, data)
        losses.append(np.atleast_1d(metrics["loss"]))
    state = state._replace(key=jax.random.key_data(state.key))
    return state, np.concatenate(losses)


OPTIMIZER = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10))


def test_two_runs_from_one_seed_agree_bit_for_bit():
    assert_identical(many(OPTIMIZER, 3, 2), many(OPTIMIZER, 3, 2))


def test_calls_of_other_lengths_agree_bit_for_bit():
    assert_identical(many(OPTIMIZER, 2, 3), many(OPTIMIZER, 3, 2))


@pytest.mark.parametrize("objective", [OBJECTIVE, NOISY], ids=["plain", "noisy"])
def test_many_steps_in_one_call_agree_with_as_many_calls_bit_for_bit(objective):
    together, apart = (many(OPTIMIZER, *calls, objective) for calls in ((1, 6), (6, 1)))
    assert_identical(together, apart)


def test_key_schedule_and_count_live_in_the_state():
    """Another step, made anew, continues where the state says, not where it began."""
    straight, losses = many(OPTIMIZER, 6, 1)
    state = begin(OPTIMIZER, NOISY, key=jax.random.key(7), ema_decay=0.9)
    seen = []
    for n in range(6):
        step = bh.train_step(NOISY, optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10)))
        state, metrics = step(state, jax.tree.map(lambda leaf: leaf[0], stacked(1, n)))
        seen.append(metrics["loss"])
    assert_identical(np.asarray(seen), losses)
    assert_identical(state._replace(key=jax.random.key_data(state.key)), straight)
    assert int(state.step) == 6


def test_a_state_is_saved_and_continues_bit_for_bit():
    step = bh.train_step(NOISY, OPTIMIZER, accumulate=2)

    def run(state, *seeds):
        for seed in seeds:
            state, metrics = step(state, batch(seed))
        return state, metrics

    def new():
        return begin(OPTIMIZER, NOISY, key=jax.random.key(7), ema_decay=0.9, loss_scale=4.0)

    straight = run(new(), 0, 1, 2, 3)
    state, _ = run(new(), 0, 1)
    leaves, structure = jax.tree.flatten(state._replace(key=jax.random.key_data(state.key)))
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        state = jax.tree.unflatten(structure, [jnp.asarray(saved[name]) for name in saved])
    resumed = run(state._replace(key=jax.random.wrap_key_data(state.key)), 2, 3)
    words = [(s._replace(key=jax.random.key_data(s.key)), m) for s, m in (straight, resumed)]
    assert_identical(*words)


def test_every_step_has_its_own_noise():
    state = begin(optax.sgd(0.0), NOISY, key=jax.random.key(7))
    step = bh.train_step(NOISY, optax.sgd(0.0), steps_per_call=5)
    data = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), batch())
    _, metrics = step(state, data)
    assert len(set(np.asarray(metrics["loss"]))) == 5


# Compiled once, no hidden waiting -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_neither_waits_for_the_device_nor_moves_data(steps):
    optimizer = optax.adamw(1e-3)
    state = begin(optimizer, NOISY, key=jax.random.key(0), ema_decay=0.9, loss_scale=8.0)
    step = bh.train_step(
        NOISY, optimizer, accumulate=2, clip_norm=1.0, nonfinite="skip", steps_per_call=steps
    )
    data = batch() if steps == 1 else stacked(steps)
    state, _ = step(state, data)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = step(state, data)
    assert int(state.step) == 4 * steps


def test_a_step_is_compiled_once_for_each_shape():
    traces = []

    def traced(logits, targets, weights=None):
        traces.append(logits.shape)
        return jnp.sum(logits), jnp.asarray(1.0)

    objective = bh.objective(MODEL, OBJECTIVE_LOSS, metrics={"traced": traced})
    state = begin(optax.adam(1e-3), objective)
    step = bh.train_step(objective, optax.adam(1e-3))
    state, _ = step(state, batch())
    count = len(traces)
    for seed in range(5):
        state, _ = step(state, batch(seed))
    assert len(traces) == count
    state, _ = step(state, batch(rows=4))
    assert len(traces) > count
    assert step.jitted._cache_size() == 2


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "at least 1 micro-batch, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0"),
        ({"clip_norm": float("nan")}, "clip_norm must be above 0, got nan"),
        ({"clip_layer_norm": -1.0}, "clip_layer_norm must be above 0, got -1"),
        ({"clip_example_norm": 0.0}, "a norm above 0, got 0"),
        ({"steps_per_call": 0}, "steps_per_call must be at least 1, got 0"),
        ({"nonfinite": "ignore"}, "'keep', 'drop' or 'skip', got 'ignore'"),
        ({"gradients": "numeric"}, "'manual' or 'automatic', got 'numeric'"),
        ({"gradients": "automatic", "clip_example_norm": 1.0}, "needs the hand-written reverse"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused(unchecked, settings, message):
    with pytest.raises(ValueError, match=message):
        bh.train_step(OBJECTIVE, optax.sgd(0.1), **settings)


def test_a_state_or_batch_that_does_not_fit_is_refused_before_anything_compiles(nothing_compiles):
    adam, sgd = optax.adam(1e-3), optax.sgd(0.1)
    state, data = begin(adam), jax.tree.map(np.asarray, batch())
    wider = bh.objective(
        bh.chain(hidden=bh.dense(7), act=bh.tanh(), out=bh.dense(3)), OBJECTIVE_LOSS
    )
    theirs = begin(adam, wider)
    frozen = begin(adam, frozen=FROZEN)
    step = bh.train_step(OBJECTIVE, adam)
    step(begin(adam), data)  # a state that fits does not vouch for another
    batches = jax.tree.map(lambda leaf: leaf[None], data)
    foreign = state._replace(opt_state=theirs.opt_state)
    with nothing_compiles():
        with pytest.raises(ValueError, match="optimizer state is not one of these parameters"):
            bh.train_step(OBJECTIVE, sgd)(state, data)
        with pytest.raises(ValueError, match="optimizer state is not one of these parameters"):
            step(foreign, data)
        with pytest.raises(ValueError, match="with the optimizer and the `frozen` of the step"):
            step(frozen, data)
        with pytest.raises(ValueError, match="float16 needs a loss scale"):
            bh.train_step(OBJECTIVE, adam, dtype=jnp.float16)(state, data)
        with pytest.raises(ValueError, match=r"need arrays of shape \(2, B, ...\), got \(1, 8"):
            bh.train_step(OBJECTIVE, adam, steps_per_call=2)(state, batches)
        with pytest.raises(ValueError, match="weights must be 0 or more"):
            step(state, {**data, "weights": -np.ones(8, np.float32)})
        with pytest.raises(ValueError, match="frozen: no parameter is at 'head/"):
            bh.train_step(OBJECTIVE, adam, frozen=["head/*"])(state, data)
        with pytest.raises(ValueError, match="one common first axis"):
            step(state, {**data, "targets": data["targets"][:3]})
