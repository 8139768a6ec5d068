"""The step: one compilation, donated state, the same run from the same key."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import backhand as bh
from tests.support import assert_close, assert_identical, labels, normal, spread

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


def test_a_step_compiles_once_for_each_shape_of_batch():
    of, optimizer = objective(), optax.adam(0.1)
    state = bh.train_state(parameters(of), optimizer, key=jax.random.key(0))
    step = bh.train_step(of, optimizer)
    state, _ = step(state, BATCH)
    before = len(TRACES)
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert (len(TRACES), step.jitted._cache_size()) == (before, 1)
    state, _ = step(state, jax.tree.map(lambda leaf: leaf[:4], BATCH))
    assert (len(TRACES) > before, step.jitted._cache_size()) == (True, 2)
    assert int(state.step) == 5


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


def test_a_run_goes_on_from_its_state_alone():
    of, optimizer = objective(noise=0.5), optax.adam(0.1)
    state = bh.train_state(parameters(of), optimizer, key=jax.random.key(0))
    state, _ = bh.train_step(of, optimizer)(state, BATCH)
    arrays, structure = jax.tree.flatten(state._replace(key=jax.random.key_data(state.key)))
    saved = structure.unflatten([np.asarray(leaf) for leaf in arrays])
    back = saved._replace(key=jax.random.wrap_key_data(jnp.asarray(saved.key)))
    again, _ = bh.train_step(of, optimizer)(jax.tree.map(jnp.asarray, back), BATCH)
    assert_identical(again.params, run(of, optimizer, 2, key=jax.random.key(0))[0])


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


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradients": "auto"}, "'manual' or 'automatic', got 'auto'"),
        ({"accumulate": 0}, "at least 1 micro-batch, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0.0"),
        ({"nonfinite": "ignore"}, "'keep', 'drop' or 'skip', got 'ignore'"),
        ({"steps_per_call": 0}, "steps_per_call must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(unchecked, nothing_compiles, settings, message):
    with nothing_compiles(), pytest.raises(ValueError, match=message):
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


def test_a_state_of_another_optimizer_or_without_a_key_is_refused(nothing_compiles):
    of = objective(noise=0.5)
    params = parameters(of)
    adam = bh.train_state(params, optax.adam(0.1), key=jax.random.key(0))
    keyless = bh.train_state(params, optax.sgd(0.1))
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"not one of these parameters and this optimizer"):
            bh.train_step(of, optax.sgd(0.1, momentum=0.9))(adam, BATCH)
        with pytest.raises(ValueError, match="dropout needs a key while training"):
            bh.train_step(of, optax.sgd(0.1))(keyless, BATCH)


def test_a_state_that_was_used_up_or_is_none_is_refused(unchecked):
    state = bh.train_state(parameters(), optax.sgd(0.1), key=jax.random.key(0))
    step = bh.train_step(objective(), optax.sgd(0.1))
    step(state, BATCH)
    with pytest.raises(ValueError, match="used up by an earlier step"):
        step(state, BATCH)
    with pytest.raises(TypeError, match=r"made by bh\.train_state"):
        step(parameters(), BATCH)


def test_a_step_traces_its_objective_once():
    once = chex.assert_max_traces(bh.metrics.accuracy, n=1)
    step = bh.train_step(objective(metrics={"accuracy": once}), optax.sgd(0.1))
    state = bh.train_state(parameters(), optax.sgd(0.1), key=jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, BATCH)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        step(state, jax.tree.map(lambda leaf: leaf[:4], BATCH))
    chex.clear_trace_counter()
