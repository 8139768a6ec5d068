"""Training with hand-written gradients follows training with automatic ones, whatever the rule.

Twenty update rules of Optax and ten schedules: each rule with one schedule, each schedule with two
rules, 200 steps in one call, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal, spread

STEPS = 200

SCHEDULES = {
    "constant": lambda peak: optax.constant_schedule(peak),
    "linear": lambda peak: optax.linear_schedule(peak, peak / 10, STEPS),
    "polynomial": lambda peak: optax.polynomial_schedule(peak, peak / 100, 2, STEPS),
    "exponential": lambda peak: optax.exponential_decay(peak, 50, 0.5),
    "staircase": lambda peak: optax.exponential_decay(peak, 50, 0.5, staircase=True),
    "cosine": lambda peak: optax.cosine_decay_schedule(peak, STEPS, 0.1),
    "warm-up and cosine": lambda peak: optax.warmup_cosine_decay_schedule(0, peak, 20, STEPS),
    "one cycle": lambda peak: optax.cosine_onecycle_schedule(STEPS, peak),
    "restarts": lambda peak: optax.sgdr_schedule(
        [
            {"init_value": 0.0, "peak_value": peak, "decay_steps": 100, "warmup_steps": 10}
            for _ in range(2)
        ]
    ),
    "joined": lambda peak: optax.join_schedules(
        [optax.linear_schedule(0.0, peak, 50), optax.piecewise_constant_schedule(peak, {70: 0.3})],
        [50],
    ),
}

RULES = {
    "sgd": (optax.sgd, 0.1),
    "nesterov": (functools.partial(optax.sgd, momentum=0.9, nesterov=True), 0.03),
    "adam": (optax.adam, 1e-2),
    "adamw": (functools.partial(optax.adamw, weight_decay=0.1), 1e-2),
    "nadam": (optax.nadam, 1e-2),
    "radam": (optax.radam, 1e-2),
    "adamax": (optax.adamax, 1e-2),
    "amsgrad": (optax.amsgrad, 1e-2),
    "adabelief": (optax.adabelief, 1e-2),
    "adan": (optax.adan, 1e-2),
    "yogi": (optax.yogi, 1e-2),
    "novograd": (optax.novograd, 1e-2),
    "rmsprop": (optax.rmsprop, 1e-2),
    "adagrad": (optax.adagrad, 0.1),
    "adafactor": (functools.partial(optax.adafactor, min_dim_size_to_factor=4), 1e-2),
    "lamb": (optax.lamb, 1e-2),
    "lars": (optax.lars, 0.1),
    "lion": (optax.lion, 1e-3),
    "optimistic descent": (optax.optimistic_gradient_descent, 0.1),
    "fromage": (optax.fromage, 1e-2),
}

PAIRS = [(rule, list(SCHEDULES)[place % len(SCHEDULES)]) for place, rule in enumerate(RULES)]

OBJECTIVE = bh.objective(
    bh.chain(bh.dense(5), bh.tanh(), bh.dense(3)), bh.losses.softmax_cross_entropy
)


@functools.cache
def batches():
    return {
        "inputs": normal(0, STEPS, 6, 4),
        "targets": labels(1, 3, STEPS, 6),
        "weights": jnp.asarray(labels(2, 3, STEPS, 6), float),
    }


def trained(optimizer, gradients, **settings):
    """(state, metrics of every step) after 200 steps in one call."""
    params = spread(OBJECTIVE.init(jax.random.key(0), jax.tree.map(lambda x: x[0], batches())))
    state = bh.train_state(params, optimizer)
    step = bh.train_step(
        OBJECTIVE, optimizer, gradients=gradients, steps_per_call=STEPS, **settings
    )
    state, metrics = step(state, batches())
    return (state.params, state.opt_state), metrics


@pytest.mark.oldest_only
@pytest.mark.parametrize(("rule", "schedule"), PAIRS, ids=[" with ".join(pair) for pair in PAIRS])
def test_hand_written_gradients_train_as_automatic_ones_do(x64, rule, schedule):
    make, peak = RULES[rule]
    optimizer = make(SCHEDULES[schedule](peak))
    manual, automatic = (trained(optimizer, kind) for kind in ("manual", "automatic"))
    assert_close(manual, automatic, 1e-10, floor=1e-12)


def test_twenty_rules_meet_ten_schedules_twice():
    assert (len(RULES), len(SCHEDULES)) == (20, 10)
    assert all(sum(name == schedule for _, name in PAIRS) == 2 for schedule in SCHEDULES)


def test_a_gradient_that_is_a_little_wrong_does_not_follow(x64):
    def wrong(gradients, state, params=None):
        return jax.tree.map(lambda g: g * (1 + 1e-7), gradients), state

    slightly = optax.chain(optax.GradientTransformation(lambda params: (), wrong), optax.sgd(0.1))
    off, right = trained(slightly, "manual"), trained(optax.sgd(0.1), "automatic")
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(off[0][0], right[0][0], 1e-10, floor=1e-12)
