"""The step: one compilation, donated state, the same run from the same key."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import backhand as bh
from tests.support import assert_close, assert_identical, labels, normal, spread
from tests.training.common import (
    FROZEN,
    NOISY,
    OBJECTIVE,
    batch,
    begin,
    stacked,
)

TRACES = []


def counting():
    """An identity that counts how often it is traced."""

    def forward(params, x):
        TRACES.append(x.shape)
        return x, ()

    return bh.layer("counting", lambda key, x: (), forward, lambda params, residuals, dy: ((), dy))


def model(noise=0.0):
    return bh.chain(
        count=counting(), stem=bh.dense(5), act=bh.tanh(), drop=bh.dropout(noise), head=bh.dense(3)
    )


def objective(noise=0.0, **settings):
    return bh.objective(model(noise), bh.losses.softmax_cross_entropy, **settings)


BATCH = {"inputs": np.asarray(normal(0, 8, 4)), "targets": np.asarray(labels(1, 3, 8))}


def parameters(of=None):
    return spread((of or objective()).init(jax.random.key(0), BATCH))


def run(of, optimizer, steps, batch=BATCH, key=None, **settings):
    """(parameters, metrics of each step) of a short run."""
    state = bh.train_state(parameters(of), optimizer, key=key)
    step, history = bh.train_step(of, optimizer, **settings), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        history.append(metrics)
    return state.params, history


def test_a_step_is_the_update_of_the_rule(x64):
    batch = jax.tree.map(np.asarray, BATCH | {"inputs": normal(0, 8, 4)})
    of = objective(metrics={"accuracy": bh.metrics.accuracy})
    params = parameters(of)
    value, grads = jax.jit(jax.value_and_grad(of))(params, batch, key=jax.random.key(0))
    state = bh.train_state(params, optax.sgd(0.5), key=jax.random.key(0))
    state, metrics = bh.train_step(of, optax.sgd(0.5))(state, batch)
    assert int(state.step) == 1
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
    assert {"accuracy", "gradient_norm", "loss"} <= metrics.keys()
    assert_close(metrics["loss"], value)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    assert_close(metrics["gradient_norm"], norm)
    logits = np.asarray(model()(params, jnp.asarray(batch["inputs"]), training=False))
    hits = logits.argmax(-1) == batch["targets"]
    assert float(metrics["accuracy"]) == pytest.approx(hits.mean())


def test_a_step_compiles_once_for_each_shape_of_batch(nothing_compiles):
    of, optimizer = objective(), optax.adam(0.1)
    state = bh.train_state(parameters(of), optimizer, key=jax.random.key(0))
    step = bh.train_step(of, optimizer)
    state, _ = step(state, BATCH)
    before = len(TRACES)
    with nothing_compiles():
        for _ in range(3):
            state, _ = step(state, BATCH)
    assert len(TRACES) == before
    state, _ = step(state, jax.tree.map(lambda leaf: leaf[:4], BATCH))
    assert len(TRACES) > before
    assert int(state.step) == 5


def test_a_step_may_be_part_of_a_program():
    of, optimizer = objective(), optax.sgd(0.1)
    state = bh.train_state(parameters(of), optimizer, key=jax.random.key(0))
    after, _ = jax.eval_shape(bh.train_step(of, optimizer), state, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_the_state_is_donated_and_the_users_arrays_stay():
    of, optimizer, key = objective(), optax.sgd(0.1), jax.random.key(0)
    params = parameters(of)
    copies = jax.device_get(params)
    first = bh.train_state(params, optimizer, key=key)
    step = bh.train_step(of, optimizer)
    second, _ = step(first, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, key, second)))
    assert_identical(params, copies)
    for param in jax.tree.leaves(params):
        assert np.isfinite(param + 1).all()


def test_a_run_is_a_function_of_its_key():
    of, optimizer = objective(noise=0.5), optax.adam(0.1)
    runs = [run(of, optimizer, 3, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    assert_identical(runs[0], runs[1])
    assert runs[0][1][0]["loss"] != runs[2][1][0]["loss"]
    still = bh.train_step(of, optax.sgd(0.0))
    state = bh.train_state(parameters(of), optax.sgd(0.0), key=jax.random.key(0))
    losses = []
    for _ in range(3):
        state, metrics = still(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3  # every step drops its own


RULES = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "plateau": optax.chain(
        optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=1, cooldown=0, factor=0.5)
    ),
    "l-bfgs": optax.lbfgs(),
}


@pytest.mark.parametrize("rule", RULES)
def test_hand_written_and_automatic_training_go_the_same_way(x64, rule):
    """Also rules that ask for the loss, the gradient or the objective itself."""
    batch = BATCH | {"inputs": normal(0, 8, 4), "weights": np.arange(8.0)}
    of = objective(noise=0.0 if rule == "l-bfgs" else 0.2)
    steps = 5 if rule == "l-bfgs" else 50
    key = jax.random.key(0)
    manual, automatic = (
        run(of, RULES[rule], steps, batch, key, gradients=kind) for kind in ("manual", "automatic")
    )
    assert_close(manual, automatic, 1e-6 if rule == "l-bfgs" else 1e-10)
    losses = [float(metrics["loss"]) for metrics in manual[1]]
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
def test_a_step_in_micro_batches_is_the_step(x64, gradients):
    batch = BATCH | {"inputs": normal(0, 8, 4), "weights": np.asarray([0, 1, 0, 0, 2, 1, 0, 3.0])}
    of = objective()
    key = jax.random.key(0)
    whole, parts = (
        run(of, optax.adam(0.1), 3, batch, key, gradients=gradients, accumulate=k) for k in (1, 4)
    )
    assert_close(parts, whole, 1e-9)


# Many steps in one call, and the state ------------------------------------------------------------


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


# No hidden waiting --------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_waits(monkeypatch):
    """A context in which it is an error to read an array from the device, or to wait for one."""

    def wait(*_, **__):
        raise AssertionError("waited for the device")

    def of_the_host(function):
        def guarded(x, *args, **given):
            return wait() if isinstance(x, jax.Array) else function(x, *args, **given)

        return guarded

    with monkeypatch.context() as patch:
        kind = type(jnp.zeros(()))
        patch.setattr(kind, "_value", property(wait))  # float, bool, jax.device_get
        patch.setattr(kind, "block_until_ready", wait)
        patch.setattr(kind, "item", wait)
        for name in ("asarray", "array"):
            patch.setattr(np, name, of_the_host(getattr(np, name)))
        yield


WAYS_TO_WAIT = {
    "float": float,
    "bool": bool,
    "item": lambda x: x.item(),
    "device_get": jax.device_get,
    "block_until_ready": jax.block_until_ready,
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x),
}


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    optimizer = optax.adamw(1e-3)
    state = begin(optimizer, NOISY, key=jax.random.key(0), ema_decay=0.9, loss_scale=8.0)
    step = bh.train_step(NOISY, optimizer, accumulate=2, clip_norm=1.0, nonfinite="skip")
    data = batch()
    state, _ = step(state, data)
    with nothing_waits(monkeypatch):
        for _ in range(3):
            state, metrics = step(state, data)
        for way in WAYS_TO_WAIT.values():
            with pytest.raises(AssertionError, match="waited for the device"):
                way(metrics["loss"])
    assert int(state.step) == 4


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gradients": "auto"}, ValueError, "'manual' or 'automatic', got 'auto'"),
        ({"accumulate": 0}, ValueError, "at least 1 micro-batch, got 0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be above 0, got 0"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm must be above 0, got nan"),
        ({"clip_layer_norm": -1.0}, ValueError, "clip_layer_norm must be above 0, got -1"),
        ({"clip_example_norm": 0.0}, ValueError, "a norm above 0, got 0"),
        (
            {"gradients": "automatic", "clip_example_norm": 1.0},
            ValueError,
            "needs the hand-written reverse",
        ),
        ({"nonfinite": "ignore"}, ValueError, "'keep', 'drop' or 'skip', got 'ignore'"),
        ({"steps_per_call": 0}, ValueError, "steps_per_call must be at least 1, got 0"),
        ({"steps_per_call": 2.5}, TypeError, "a whole number, got 2.5"),
        ({"dtype": jnp.int32}, ValueError, "dtype must be a floating-point one, got int32"),
        ({"dtype": "bf16"}, TypeError, r"dtype must be one such as jnp\.bfloat16, got 'bf16'"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be a number, got '1'"),
        ({"clip_example_norm": "1"}, TypeError, "the norm of an example must be a number, got '1'"),
        ({"frozen": "hidden/*"}, ValueError, r"frozen takes a list of paths.*\['hidden/\*'\]"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(
    unchecked, nothing_compiles, settings, error, message
):
    with nothing_compiles(), pytest.raises(error, match=message):
        bh.train_step(objective(), optax.sgd(0.1), **settings)


def test_a_bad_batch_is_refused_before_anything_compiles(unchecked, nothing_compiles):
    of, optimizer = objective(), optax.sgd(0.1)
    state = bh.train_state(parameters(of), optimizer, key=jax.random.key(0))
    step = bh.train_step(of, optimizer)
    with nothing_compiles():
        for change, message in (
            ({"targets": np.full(8, 3)}, r"labels must lie in \[0, 3\).* got 3 at \[0\]"),
            ({"targets": np.zeros(7, int)}, "one common first axis"),
            ({"weight": np.ones(8)}, "did you mean 'weights'"),
            ({"inputs": np.ones((8, 9), np.float32)}, r"linear needs x .* got \(8, 9\)"),
            ({"weights": np.full(8, -1.0)}, "weights must be 0 or more, got -1.0"),
        ):
            with pytest.raises(ValueError, match=message):
                step(state, BATCH | change)
        with pytest.raises(TypeError, match=r"the optimizer must be an optax\.Gradient.*got 0.1"):
            bh.train_step(of, 0.1)
    state, _ = step(state, BATCH)
    with pytest.raises(ValueError, match="got 9 at"):
        step(state, BATCH | {"targets": np.full(8, 9, BATCH["targets"].dtype)})


def test_a_state_that_was_used_up_or_is_none_is_refused(unchecked):
    state = bh.train_state(parameters(), optax.sgd(0.1), key=jax.random.key(0))
    step = bh.train_step(objective(), optax.sgd(0.1))
    step(state, BATCH)
    with pytest.raises(ValueError, match="used up by an earlier step"):
        step(state, BATCH)
    with pytest.raises(TypeError, match=r"made by bh\.train_state"):
        step(parameters(), BATCH)


def test_a_state_or_batch_that_does_not_fit_is_refused_before_anything_compiles(nothing_compiles):
    adam, sgd = optax.adam(1e-3), optax.sgd(0.1)
    state, data = begin(adam), jax.tree.map(np.asarray, batch())
    wider = bh.objective(
        bh.chain(hidden=bh.dense(7), act=bh.tanh(), out=bh.dense(3)),
        bh.losses.softmax_cross_entropy,
    )
    theirs = begin(adam, wider)
    frozen = begin(adam, frozen=FROZEN)
    step = bh.train_step(OBJECTIVE, adam)
    step(begin(adam), data)  # a state that fits does not vouch for another
    batches = jax.tree.map(lambda leaf: leaf[None], data)
    foreign = state._replace(opt_state=theirs.opt_state)
    low = state._replace(opt_state=optax.tree.cast(state.opt_state, jnp.bfloat16))
    averaged = state._replace(average=begin(adam, wider, ema_decay=0.9).average)
    noisy, keyless = objective(noise=0.5), bh.train_state(parameters(), sgd)
    with nothing_compiles():
        with pytest.raises(ValueError, match="optimizer state is not one of these parameters"):
            bh.train_step(OBJECTIVE, sgd)(state, data)
        with pytest.raises(ValueError, match="optimizer state is not one of these parameters"):
            step(foreign, data)
        with pytest.raises(ValueError, match="with the optimizer and the `frozen` of the step"):
            step(frozen, data)
        with pytest.raises(ValueError, match="optimizer state is not one of these parameters"):
            step(low, data)
        with pytest.raises(ValueError, match="average is not one of these parameters"):
            step(averaged, data)
        with pytest.raises(ValueError, match="dropout needs a key while training"):
            bh.train_step(noisy, sgd)(keyless, BATCH)
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
