"""The state: what a run carries, and what the optimizer may touch of it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh
from backhand.training.state import learned, learning
from tests.support import assert_identical, spread

MODEL = bh.chain(norm=bh.batch_norm(), out=bh.dense(2))


def parameters():
    return spread(jax.jit(lambda key: MODEL.init(key, jnp.ones((4, 3))))(jax.random.key(0)))


def test_a_state_is_a_pytree_that_begins_at_step_zero():
    params, key = parameters(), jax.random.key(3)
    state = bh.train_state(params, optax.adam(1e-3), key=key)
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    assert_identical(state.params, params)
    leaves, structure = jax.tree.flatten(state)
    assert structure.unflatten(leaves).opt_state is not None
    assert bh.train_state(params, optax.adam(1e-3)).key is None


def test_the_optimizer_keeps_nothing_for_running_statistics():
    state = bh.train_state(parameters(), optax.adam(1e-3))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * 4
    mask = learned(parameters())
    assert mask["norm"]["running"] == bh.Running(False, False)
    assert (mask["norm"]["scale"], mask["out"]["w"]) == (True, True)


def test_weight_decay_leaves_running_statistics_alone():
    params = parameters()
    optimizer = learning(optax.adamw(0.1, weight_decay=0.5), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["norm"]["running"]))
    assert updates["out"]["w"].any() and updates["norm"]["scale"].any()


def test_frozen_paths_are_patterns():
    params = parameters()
    mask = learned(params, ["out/*", "norm/scale"])
    assert (mask["out"], mask["norm"]["scale"]) == ({"w": False, "b": False}, False)
    assert mask["norm"]["offset"] is True
    assert bh.train_state(params, optax.adam(0.1), frozen=["*"]).opt_state is not None
    with pytest.raises(ValueError, match=r"no parameter is at 'ou/\*'; there are .*'out/w'"):
        bh.train_state(params, optax.adam(0.1), frozen=["ou/*"])


def test_an_average_of_low_precision_parameters_is_kept_in_float32():
    zeros, ones = (
        {"w": fill((), jnp.bfloat16), "n": jnp.arange(2)} for fill in (jnp.zeros, jnp.ones)
    )
    average = bh.train_state(zeros, optax.sgd(0.1), ema_decay=0.999).average

    @jax.jit
    def after(average, steps):
        return jax.lax.fori_loop(0, steps, lambda _, average: average.updated(ones), average)

    average = after(average, 2000)
    assert (average.params["w"].dtype, average.params["n"].dtype) == (jnp.float32, jnp.int32)
    assert float(average.params["w"]) == pytest.approx(1 - 0.999**2000, rel=1e-4)


def test_what_makes_no_state_is_refused(unchecked, nothing_compiles):
    params = parameters()
    message = r"must be an optax\.GradientTransformation, such as optax\.adamw\(1e-3\); got "
    with nothing_compiles():
        for wrong in (0.1, optax.adam, None):
            with pytest.raises(TypeError, match=message):
                learning(wrong, params)
        for decay in (-0.1, 1.0):
            with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), got"):
                bh.train_state(params, optax.sgd(0.1), ema_decay=decay)
        for scale in (0.5, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=r"loss_scale must lie in \[1, 2\*\*24\], got"):
                bh.train_state(params, optax.sgd(0.1), loss_scale=scale)
