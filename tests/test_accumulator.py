"""Micro-batches that arrive one at a time give what the whole batch gives."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, assert_identical, labels, normal, spread

METRICS = {
    "accuracy": bh.metrics.accuracy,
    "seen": lambda logits, targets, weights=None: bh.metrics.Sum(jnp.asarray(targets.size)),
    "largest": lambda logits, targets, weights=None: bh.metrics.Max(jnp.max(logits)),
    "latest": lambda logits, targets, weights=None: bh.metrics.Last(targets[-1]),
}
MODEL = bh.chain(bh.dense(4), bh.tanh(), bh.dense(3))
OBJECTIVE = bh.objective(MODEL, bh.losses.softmax_cross_entropy, metrics=METRICS)
EVALUATION = bh.value_and_grad(OBJECTIVE)


def batch(rows=8):
    weights = np.random.default_rng(2).integers(0, 3, rows)
    return {
        "inputs": normal(0, rows, 5),
        "targets": labels(1, 3, rows),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def cut(data, *places):
    """The batch in parts, ending at the places."""
    ends = [0, *places, len(data["targets"])]
    pairs = itertools.pairwise(ends)
    return [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], data) for a, b in pairs]


def parameters():
    return spread(OBJECTIVE.init(jax.random.key(0), batch()))


def added(window, params, parts, **given):
    sums = window.init(params, parts[0], **given)
    for part in parts:
        sums = window.add(sums, params, part, **given)
    return sums


def measured(window, sums, dropped):
    """The metrics but for "dropped", which is so many; None where nothing may be."""
    metrics = window.measured(sums)
    assert metrics.pop("dropped", None) == dropped
    return metrics


def test_a_window_gives_the_gradient_of_all_its_micro_batches(x64):
    params, data = parameters(), batch()
    window = bh.accumulator(EVALUATION, 4)
    result, empty = window.take(added(window, params, cut(data, 2, 4, 6)))
    assert_close(result, jax.jit(EVALUATION)(params, data))
    assert not any(leaf.any() for leaf in jax.tree.leaves(empty))


def test_ragged_micro_batches_count_for_what_they_weigh(x64):
    params, data = parameters(), batch()
    window = bh.accumulator(EVALUATION, 3)
    result, _ = window.take(added(window, params, cut(data, 5, 6)))
    assert_close(result, jax.jit(EVALUATION)(params, data))


def test_windows_follow_one_another(x64):
    params, data = parameters(), batch()
    window = bh.accumulator(EVALUATION, 2)
    parts = cut(data, 2, 4, 6)
    _, sums = window.take(added(window, params, parts[:2]))
    for part in parts[2:]:
        sums = window.add(sums, params, part)
    result, _ = window.take(sums)
    last = jax.tree.map(lambda leaf: leaf[4:], data)
    assert_close(result, jax.jit(EVALUATION)(params, last))


def test_a_window_is_ready_when_it_is_full():
    params, parts = parameters(), cut(batch(), 2, 4, 6)
    window = bh.accumulator(EVALUATION, 3)
    sums, ready = window.init(params, parts[0]), []
    for part in parts:
        ready.append(window.ready(sums))
        sums = window.add(sums, params, part)
    assert [*ready, window.ready(sums)] == [False, False, False, True, True]


def test_a_partial_window_is_applied_or_carried_by_choice(x64):
    params, data = parameters(), batch()
    parts = cut(data, 2, 4, 6)
    window = bh.accumulator(EVALUATION, 4)
    sums = added(window, params, parts[:3])
    with pytest.raises(ValueError, match="a full window of 4 micro-batches, got 3; add more"):
        window.take(sums)
    applied, _ = window.take(sums, partial=True)
    first = jax.tree.map(lambda leaf: leaf[:6], data)
    assert_close(applied, jax.jit(EVALUATION)(params, first))
    carried, _ = window.take(window.add(sums, params, parts[3]))
    assert_close(carried, jax.jit(EVALUATION)(params, data))
    with pytest.raises(ValueError, match="got 0"):
        window.take(window.init(params, parts[0]), partial=True)


def test_metrics_follow_their_own_rule(x64):
    params, data = parameters(), batch()
    window = bh.accumulator(EVALUATION, 4)
    measured = window.measured(added(window, params, cut(data, 1, 4, 6)))
    assert_close(measured, OBJECTIVE.forward(params, data)[0].measured())


@pytest.mark.parametrize("sick", [0, 1, 3])
def test_a_micro_batch_that_is_not_finite_is_dropped_with_its_metrics(x64, sick):
    params, parts = parameters(), cut(batch(), 2, 4, 6)
    poisoned = [*parts]
    poisoned[sick] = {**parts[sick], "inputs": parts[sick]["inputs"].at[0].set(jnp.nan)}
    poisoned[sick]["weights"] = jnp.ones(2)
    window = bh.accumulator(EVALUATION, 4, nonfinite="drop")
    sums = added(window, params, poisoned)
    assert (int(sums.added), int(sums.dropped)) == (4, 1)
    healthy = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(p for i, p in enumerate(parts) if i != sick)
    )
    assert_close(measured(window, sums, 1), OBJECTIVE.forward(params, healthy)[0].measured())
    assert_close(window.take(sums)[0], jax.jit(EVALUATION)(params, healthy))
    kept = bh.accumulator(EVALUATION, 4)
    assert jnp.isnan(kept.take(added(kept, params, poisoned))[0][0])


def test_nothing_but_dropped_micro_batches_is_a_gradient_of_zero():
    params, data = parameters(), batch()
    sick = {**data, "inputs": data["inputs"] * jnp.inf, "weights": jnp.ones(8)}
    window = bh.accumulator(EVALUATION, 2, nonfinite="drop")
    sums = added(window, params, cut(sick, 4))
    (value, grads), _ = window.take(sums)
    assert (float(value), int(sums.dropped)) == (0, 2)
    assert not any(leaf.any() for leaf in jax.tree.leaves((grads, measured(window, sums, 2))))


def test_a_window_without_weight_is_a_gradient_of_zero():
    params, data = parameters(), {**batch(), "weights": jnp.zeros(8)}
    window = bh.accumulator(EVALUATION, 2)
    sums = added(window, params, cut(data, 4))
    (value, grads), _ = window.take(sums)
    assert (float(value), float(sums.weight)) == (0, 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_sums_are_saved_and_go_on_bit_for_bit():
    params, parts = parameters(), cut(batch(), 2, 4, 6)
    window = bh.accumulator(EVALUATION, 4)
    straight = added(window, params, parts)

    leaves, structure = jax.tree.flatten(added(window, params, parts[:2]))
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        sums = jax.tree.unflatten(structure, [jnp.asarray(saved[name]) for name in saved])
    for part in parts[2:]:
        sums = window.add(sums, params, part)
    assert_identical(sums, straight)


def test_sums_are_donated_and_compiled_once_for_each_shape(nothing_compiles):
    params, parts = parameters(), cut(batch(), 2, 4, 6)
    window = bh.accumulator(EVALUATION, 4)
    first = added(window, params, parts[:2])
    _, sums = window.take(first, partial=True)
    sums = window.add(sums, params, parts[2])
    with nothing_compiles():
        second = window.add(sums, params, parts[3])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(sums.collected))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((second, params)))


def test_every_micro_batch_of_a_window_has_its_own_key(x64):
    noisy = bh.objective(bh.chain(bh.dense(4), bh.dropout(0.5)), bh.losses.mean_squared_error)
    evaluation = bh.value_and_grad(noisy)
    data = {"inputs": jnp.ones((1, 3)), "targets": jnp.zeros((1, 4))}
    params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}, ()
    window = bh.accumulator(evaluation, 8)
    (_, grads), _ = window.take(added(window, params, [data] * 8, key=jax.random.key(0)))
    # Were the key used again, every output would be kept always or never.
    kept = grads[0]["b"] / jnp.max(grads[0]["b"])
    assert ((kept > 0) & (kept < 1)).any()
    both = jax.tree.map(lambda leaf: jnp.repeat(leaf, 8, 0), data)
    at_once = bh.accumulate(evaluation, 8)(params, both, key=jax.random.key(0))
    assert_close(grads, at_once[1])


def test_sums_of_low_precision_gradients_run_in_float32():
    """A bfloat16 sum of 512 equal parts would stop at half."""
    objective = bh.objective(bh.dense(1, bias=False), bh.losses.mean_absolute_error)
    params = {"w": jnp.ones((4, 1), jnp.bfloat16)}
    data = {"inputs": jnp.ones((2, 4), jnp.bfloat16), "targets": jnp.full((2, 1), -9, jnp.bfloat16)}
    window = bh.accumulator(bh.value_and_grad(objective), 512)
    (_, grads), _ = window.take(added(window, params, [data] * 512))
    assert_close(grads, {"w": jnp.ones((4, 1), jnp.float32)}, 1e-6)


def test_gradients_and_statistics_are_accumulated_together(x64):
    objective = bh.objective(
        bh.chain(bh.batch_norm(), bh.dense(3)), bh.losses.softmax_cross_entropy
    )
    both = bh.value_and_collect(objective, gradients=bh.gradients, statistics=bh.statistics)
    data = {"inputs": normal(0, 8, 5), "targets": labels(1, 3, 8)}
    params = objective.init(jax.random.key(0), data)
    window = bh.accumulator(both, 2)
    (_, streamed), _ = window.take(added(window, params, [data, data]))
    _, collected = jax.jit(both)(params, data)
    assert_close(streamed["gradients"], collected["gradients"])
    twice = jax.tree.map(lambda x: 2 * x, collected["statistics"])
    assert_close(streamed["statistics"], twice)


def test_a_function_of_any_library_is_accumulated(x64):
    def squared(params, part):
        error = part["inputs"] @ params - part["targets"]
        return jnp.sum(part["weights"] * error**2), jnp.sum(part["weights"])

    weights = jnp.asarray([0.0, 0, 0, 2, 1, 0, 1, 5])
    data = {"inputs": normal(0, 8, 3), "targets": normal(1, 8), "weights": weights}
    params = normal(2, 3)
    truth = jax.value_and_grad(lambda p: jnp.divide(*squared(p, data)))(params)
    window = bh.accumulator(jax.value_and_grad(squared, has_aux=True), 2)
    assert_close(window.take(added(window, params, cut(data, 5)))[0], truth)

    def mean(params, part):
        total, weight = squared(params, part)
        return total / weight

    window = bh.accumulator(jax.value_and_grad(mean), 2, weight=lambda p: p["weights"].sum())
    assert_close(window.take(added(window, params, cut(data, 5)))[0], truth)


def test_micro_batches_may_be_of_micro_batches_that_drop_what_is_sick(x64):
    params, data = parameters(), {**batch(), "weights": jnp.ones(8)}
    sick = {**data, "inputs": data["inputs"].at[1].set(jnp.nan)}
    window = bh.accumulator(bh.accumulate(EVALUATION, 2, nonfinite="drop"), 2)
    sums = added(window, params, cut(sick, 4))
    assert sums.metrics["dropped"].total.dtype == jnp.int64  # what a sum of integers has
    healthy = {**data, "weights": jnp.ones(8).at[jnp.asarray([1, 3])].set(0)}
    assert_close(window.take(sums)[0], jax.jit(EVALUATION)(params, healthy))
    assert int(window.measured(sums)["dropped"]) == 1


@pytest.mark.parametrize("nonfinite", ["keep", "drop"])
def test_each_term_of_a_loss_is_divided_by_the_weight_of_the_window(x64, nonfinite):
    other = bh.objective(MODEL, bh.losses.softmax_cross_entropy.bind(label_smoothing=0.1))
    both = bh.value_and_grad(bh.combine({"a": OBJECTIVE, "b": other}, {"a": 1.0, "b": 0.5}))
    params, data = parameters(), batch()
    window = bh.accumulator(both, 3, nonfinite=nonfinite)
    sums = added(window, params, cut(data, 5, 6))
    assert_close(window.take(sums)[0], jax.jit(both)(params, data))
    whole = both.objective.forward(params, data)[0].measured()
    assert_close(measured(window, sums, 0 if nonfinite == "drop" else None), whole)


def test_metrics_of_low_precision_are_summed_in_float32():
    """A bfloat16 count stops at 256."""
    counted = {"seen": lambda p, t, w=None: bh.metrics.Sum(jnp.asarray(len(t), jnp.bfloat16))}
    objective = bh.objective(MODEL, bh.losses.softmax_cross_entropy, metrics=counted)
    window = bh.accumulator(bh.value_and_grad(objective), 300)
    part = jax.tree.map(lambda leaf: leaf[:2], batch())
    sums = added(window, parameters(), [part] * 300)
    assert float(window.measured(sums)["seen"]) == 600
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (75, *[1] * (leaf.ndim - 1))), batch())
    terms, _ = bh.accumulate(bh.value_and_grad(objective), 300).evaluate(parameters(), many)
    assert float(terms.measured()["seen"]) == 600


@pytest.mark.parametrize("nonfinite", ["keep", "drop"])
def test_adding_takes_no_second_gradient(nonfinite):
    wide = bh.objective(
        bh.chain(*[layer for _ in range(4) for layer in (bh.dense(256), bh.relu())], bh.dense(3)),
        bh.losses.softmax_cross_entropy,
    )
    data = jax.tree.map(lambda leaf: leaf[:4], batch())
    params = wide.init(jax.random.key(0), data)
    window = bh.accumulator(bh.value_and_grad(wide), 4, nonfinite=nonfinite)
    sums = window.init(params, data)
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    compiled = jax.jit(window.add, donate_argnums=0).lower(sums, params, data).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < gradient / 2


def test_a_micro_batch_may_come_from_the_host():
    params, parts = parameters(), cut(batch(), 4)
    window = bh.accumulator(EVALUATION, 2)
    on_host = jax.tree.map(np.asarray, parts)
    assert_identical(
        window.take(added(window, params, on_host)), window.take(added(window, params, parts))
    )


def test_what_cannot_be_accumulated_is_refused(unchecked):
    params, data = parameters(), batch()
    with pytest.raises(ValueError, match="at least 1 micro-batch, got 0"):
        bh.accumulator(EVALUATION, 0)
    with pytest.raises(TypeError, match=r"such as bh\.value_and_grad.* got None"):
        bh.accumulator(None, 2)
    with pytest.raises(TypeError, match="weight is for other functions"):
        bh.accumulator(EVALUATION, 2, weight=lambda part: 1.0)
    with pytest.raises(ValueError, match="norms: what has a batch axis does not add up"):
        bh.accumulator(bh.value_and_collect(OBJECTIVE, norms=bh.square_norms), 2)
    window = bh.accumulator(EVALUATION, 2)
    sums = window.init(params, data)
    with pytest.raises(ValueError, match=r"weights must be 0 or more, got -1\.0 at"):
        window.add(sums, params, {**data, "weights": -np.ones(8, np.float32)})
    with pytest.raises(ValueError, match="one common first axis"):
        window.add(sums, params, {**data, "targets": data["targets"][:3]})
    with pytest.raises(TypeError, match="one dict or tuple of arrays, got 2 arguments for it"):
        window.add(sums, params, data["inputs"], data["targets"])
    window.add(sums, params, data)
    for use in (window.ready, lambda sums: window.add(sums, params, data)):
        with pytest.raises(ValueError, match="used up by an earlier add: go on with those that"):
            use(sums)
    sums = window.init(params, data)
    other = bh.objective(bh.chain(bh.dense(3)), bh.losses.softmax_cross_entropy)
    theirs = bh.accumulator(bh.value_and_grad(other), 2)
    with pytest.raises(
        ValueError, match="sums are not of these parameters: make new ones with init"
    ):
        theirs.add(sums, other.init(jax.random.key(0), data), data)
    for use in (window.take, window.ready, lambda sums: window.add(sums, params, data)):
        with pytest.raises(TypeError, match=r"made by its init\(params, batch\).*; got tuple"):
            use(params)
