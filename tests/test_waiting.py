"""Micro-batches that wait for each other, and sums that a scan over depth carries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from backhand.micro_batches import columns
from backhand.waiting import (
    WAITING,
    Unsummed,
    adding,
    bytes_of,
    grouping,
    surely_finite,
    unsummed,
    waits,
)
from tests.support import assert_close, assert_identical, labels, normal, spread, temporary_bytes

WIDE = 64
BLOCK = bh.skip(bh.chain(norm=bh.layer_norm(), up=bh.dense(WIDE), act=bh.gelu(), down=bh.dense(8)))
MODELS = {
    "chain": bh.chain(bh.dense(WIDE), bh.relu(), bh.dense(WIDE), bh.dense(3)),
    "repeat": bh.chain(bh.dense(8), bh.repeat(BLOCK, 3), bh.dense(3)),
    "repeat in repeat": bh.chain(bh.dense(8), bh.repeat(bh.repeat(BLOCK, 2), 3), bh.dense(3)),
    "checkpoint in repeat": bh.chain(bh.dense(8), bh.repeat(bh.checkpoint(BLOCK), 2), bh.dense(3)),
    "frozen": bh.chain(bh.freeze(bh.dense(WIDE)), bh.dense(WIDE), bh.repeat(bh.dense(WIDE), 2)),
    "tied": bh.share(
        bh.chain(into=bh.dense(WIDE), a=bh.dense(WIDE), b=bh.dense(WIDE)), {"b/w": "a/w"}
    ),
    "tied in repeat": bh.chain(
        bh.dense(8),
        bh.repeat(bh.share(bh.chain(a=bh.dense(8), b=bh.dense(8)), {"b/w": "a/w"}), 2),
    ),
    "embedding": bh.chain(bh.embedding(97, WIDE), bh.dense(WIDE), bh.dense(3)),
    "statistics in repeat": bh.chain(bh.dense(8), bh.repeat(bh.chain(bh.dense(8), bh.tanh()), 2)),
}


def data(name, rows=24):
    if name == "embedding":
        return {"inputs": labels(0, 97, rows), "targets": labels(1, 3, rows)}
    return {"inputs": normal(0, rows, 8), "targets": labels(1, 3, rows)}


def made(name, rows=24):
    objective = bh.objective(MODELS[name], bh.losses.softmax_cross_entropy)
    batch = data(name, rows)
    return objective, spread(jax.jit(objective.init)(jax.random.key(0), batch)), batch


@functools.cache
def weighted(name):
    """An objective in float64, its parameters, a batch with weights, and the truth of that."""
    objective, params, batch = made(name)
    batch = {**batch, "weights": jnp.asarray(np.arange(24) % 3, jnp.float32)}
    return objective, params, batch, jax.jit(bh.value_and_grad(objective))(params, batch)


def group_of(objective, params, batch, micro_batches):
    part = jax.tree.map(lambda leaf: leaf[::micro_batches], batch)
    evaluation = bh.value_and_collect(objective, gradients=adding({}, waiting=True))
    like = jax.eval_shape(lambda: evaluation.evaluate(params, part)[1]["gradients"])
    return grouping(params, like)


@pytest.mark.oldest_only
@pytest.mark.parametrize(("micro_batches", "nonfinite"), [(2, "keep"), (23, "keep"), (5, "drop")])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_the_whole_batch_gradient(x64, name, micro_batches, nonfinite):
    objective, params, batch, truth = weighted(name)
    whole = bh.value_and_grad(objective)
    ours = jax.jit(bh.accumulate(whole, micro_batches, nonfinite=nonfinite))(params, batch)
    assert_close(ours, truth)


def test_small_micro_batches_wait_for_each_other():
    objective, params, batch = made("chain", 240)
    assert group_of(objective, params, batch, 240) > 4
    assert group_of(objective, params, batch, 2) == 1


@pytest.mark.parametrize("micro_batches", [7, 13, 210, 211])
def test_any_number_of_micro_batches_waits_in_groups(micro_batches):
    objective, params, batch = made("chain", micro_batches)
    most = group_of(objective, params, batch, micro_batches)
    runs = columns(batch, micro_batches).runs(most)
    assert [index for indices, _ in runs for index in indices] == list(range(micro_batches))
    assert all(len(indices) % size == 0 and size <= most for indices, size in runs)
    assert most / 2 <= runs[0][1] and len(runs) <= 2


def test_what_waits_is_small_beside_its_gradient():
    param = jnp.zeros((64, 64))
    small, large = (bh.Outer(jnp.zeros((b, 64)), jnp.zeros((b, 64))) for b in (4, 16))
    assert waits(param, small) and bytes_of(small) * 2 <= WAITING * bytes_of(param)
    assert not waits(param, large)
    assert not waits(jnp.zeros(4096), bh.Total(jnp.zeros((16, 4096))))
    assert not waits(param, None) and not waits(param, jnp.zeros((64, 64)))


def test_what_waits_is_summed_in_float32_where_parameters_are_not():
    objective, params, batch = made("chain", 256)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), low)
    _, ours = jax.jit(bh.accumulate(bh.value_and_grad(objective), 256))(low, batch)
    _, truth = bh.value_and_grad(objective)(wide, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
    for mine, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        error = np.abs(np.asarray(mine, np.float64) - np.asarray(exact)).max()
        assert error <= 2**-8 * np.abs(np.asarray(exact)).max()


def test_an_integer_parameter_that_rides_along_gets_no_gradient():
    assert not waits(
        jnp.zeros((64, 64), jnp.int32), bh.Outer(jnp.zeros((1, 64)), jnp.zeros((1, 64)))
    )


@pytest.mark.parametrize("name", ["chain", "repeat"])
@pytest.mark.parametrize("micro_batches", [2, 24])
def test_objectives_that_add_gradients_up_themselves_stay_exact(x64, name, micro_batches):
    first, params, batch = made(name)
    second = bh.objective(MODELS[name], bh.losses.softmax_cross_entropy.bind(label_smoothing=0.3))
    both = bh.combine({"a": first, "b": second}, {"a": 1.0, "b": 0.5})

    def backward(*args, **given):
        return jax.tree.map(lambda g: 2 * g, first.backward(*args, **given))

    doubled = bh.Objective(first.init, first.forward, backward, model=first.model)
    for objective in (both, doubled):
        whole = bh.value_and_grad(objective)
        ours = jax.jit(bh.accumulate(whole, micro_batches))(params, batch)
        assert_close(ours, jax.jit(whole)(params, batch))


def test_gradients_wait_under_any_name(x64):
    objective, params, batch = made("chain")
    named = bh.value_and_collect(objective, mine=bh.gradients)
    assert_close(jax.jit(bh.accumulate(named, 24))(params, batch), named(params, batch))


def test_a_step_that_freezes_by_path_leaves_what_waits_alone():
    objective, params, batch = made("chain", 240)
    step = bh.train_step(objective, optax.sgd(0.1), accumulate=240, frozen=["0/*"])
    before = jax.tree.map(jnp.copy, params)
    state, _ = step(bh.train_state(params, optax.sgd(0.1), frozen=["0/*"]), batch)
    assert_identical(state.params[0], before[0])
    assert float(jnp.abs(state.params[2]["w"] - before[2]["w"]).max()) > 0


# Whether factors are finite -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
@pytest.mark.parametrize("factor", ["x", "dy"])
def test_factors_tell_that_their_product_is_not_finite(factor, bad):
    factors = {"x": jnp.full((3, 4), 1e10), "dy": jnp.full((3, 5), 1e10)}
    healthy = bh.Outer(**factors)
    sick = bh.Outer(**factors | {factor: factors[factor].at[1, 2].set(bad)})
    assert surely_finite(healthy) and not surely_finite(sick)
    assert surely_finite(bh.Many((healthy, None))) and not surely_finite(bh.Many((healthy, sick)))
    kept = Unsummed(sick).kept(jnp.zeros((), bool)).contribution
    assert not any(leaf.any() for leaf in jax.tree.leaves(kept))


def test_the_error_of_rows_tells_that_their_sum_is_not_finite():
    rows = bh.Rows(labels(0, 9, 4), jnp.ones((4, 2)).at[3, 1].set(jnp.nan))
    assert not surely_finite(rows) and surely_finite(bh.Rows(rows.ids, jnp.ones((4, 2))))


def test_factors_that_take_more_than_the_gradient_are_summed():
    def collected(rows, dtype):
        objective = bh.objective(bh.dense(8), bh.losses.mean_squared_error)
        batch = {"inputs": normal(0, rows, 8, dtype=dtype), "targets": normal(1, rows, 8)}
        params = jax.tree.map(lambda p: p.astype(dtype), objective.init(jax.random.key(0), batch))
        evaluation = bh.value_and_collect(objective, g=unsummed(waiting=False))
        return jax.eval_shape(lambda: evaluation.evaluate(params, batch)[1]["g"]["w"])

    assert isinstance(collected(2, jnp.float32), bh.Outer)
    assert collected(9, jnp.float32).shape == (8, 8)
    assert collected(2, jnp.float16).shape == (8, 8)


# Sums carried through depth -----------------------------------------------------------------------


def test_a_repeated_block_adds_to_its_sums_without_stacking_its_gradient():
    block = bh.skip(bh.chain(bh.dense(256), bh.gelu(), bh.dense(64)))
    objective = bh.objective(
        bh.chain(bh.repeat(block, 8), bh.dense(3)), bh.losses.softmax_cross_entropy
    )

    def batch(rows):
        return {"inputs": normal(0, rows, 64), "targets": labels(1, 3, rows)}

    params = objective.init(jax.random.key(0), batch(2))
    gradient = bytes_of(params)

    def step(run):
        def descend(params, batch):
            return jax.tree.map(lambda p, g: p - g, params, run(params, batch)[1])

        return descend

    evaluate = bh.value_and_grad(objective)
    plain = temporary_bytes(step(evaluate), params, batch(64))
    for micro_batches in (4, 16):
        accumulated = step(bh.accumulate(evaluate, micro_batches))
        more = temporary_bytes(accumulated, params, batch(64 * micro_batches)) - plain
        assert more < gradient / 2


def test_other_collectors_ride_along_a_repeated_block(x64):
    objective, params, batch = made("repeat")
    both = bh.value_and_collect(objective, gradients=bh.gradients, norms=bh.square_norms)
    _, ours = jax.jit(bh.accumulate(both, 4))(params, batch)
    _, whole = both(params, batch)
    assert_close(ours, whole)
