"""Micro-batches give what the whole batch gives: any split, mask, weights and number of terms."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

import backhand as bh
from backhand.metrics import Last, Max, Sum
from tests.support import assert_close, labels, normal, spread

BATCH, TIME = 12, 3
MODEL = bh.chain(bh.dense(4), bh.tanh(), bh.dense(5))
METRICS = {
    "accuracy": bh.metrics.accuracy,
    "positions": lambda logits, targets, weights=None: Sum(jnp.asarray(targets.size)),
    "largest": lambda logits, targets, weights=None: Max(jnp.max(logits)),
}
OBJECTIVE = bh.objective(MODEL, bh.losses.softmax_cross_entropy, metrics=METRICS)
COLLECT = bh.value_and_collect(OBJECTIVE, gradients=bh.gradients, norms=bh.square_norms)


def batch(weights=None):
    data = {"inputs": normal(0, BATCH, TIME, 4), "targets": labels(1, 5, BATCH, TIME)}
    return data if weights is None else {**data, "weights": weights}


@functools.cache
def parameters(wide):
    with jax.enable_x64(wide):
        return spread(OBJECTIVE.init(jax.random.key(0), batch()))


@functools.cache
def compiled(micro_batches, wide):
    """(terms' value, metrics, collected); the flag makes float64 another compilation."""
    evaluation = bh.accumulate(COLLECT, micro_batches)

    @jax.jit
    def run(params, batch):
        terms, collected = evaluation.evaluate(params, batch)
        return terms.mean(), terms.measured(), collected

    return run


def some_weights():
    per_example, per_position = (BATCH,), (BATCH, TIME)
    shapes = st.sampled_from([per_example, per_position])
    values = st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])
    return shapes.flatmap(
        lambda shape: (
            arrays.arrays(np.float32, shape, elements=values) | arrays.arrays(np.bool_, shape)
        )
    )


@pytest.mark.parametrize(("micro_batches", "wide"), [(3, True), (5, True), (12, True), (5, False)])
@given(weights=some_weights())
@settings(max_examples=8)
def test_any_split_into_micro_batches_gives_the_full_batch_gradient(micro_batches, wide, weights):
    with jax.enable_x64(wide):
        params, data = parameters(wide), batch(jnp.asarray(weights))
        whole, parts = (compiled(k, wide)(params, data) for k in (1, micro_batches))
        whole[1].pop("positions"), parts[1].pop("positions")
        assert_close(parts, whole, 1e-12 if wide else 2e-6, floor=1e-15 if wide else 1e-8)


def test_a_mean_of_means_is_not_the_mean(x64):
    weights = jnp.zeros(BATCH).at[jnp.asarray([0, 1, 3, 6])].set(1.0)
    params, data = parameters(True), batch(weights)
    parts = [jax.tree.map(lambda leaf, k=k: leaf[k::3], data) for k in range(3)]
    evaluate = jax.jit(bh.value_and_grad(OBJECTIVE))
    naive = jax.tree.map(lambda *g: sum(g) / 3, *[evaluate(params, part)[1] for part in parts])
    whole = evaluate(params, data)[1]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(naive, whole, 1e-2)


def test_norms_come_back_in_the_order_of_the_batch(x64):
    norms = compiled(3, True)(parameters(True), batch(jnp.arange(12.0)))[2]["norms"]
    sizes = bh.per_example_norms(norms)
    assert sizes.shape == (BATCH,)
    assert (sizes[0], jnp.argmin(sizes)) == (0, 0)


def test_metrics_combine_by_their_own_rule(x64):
    _, whole, _ = compiled(1, True)(parameters(True), batch())
    _, parts, _ = compiled(3, True)(parameters(True), batch())
    assert_close(parts, whole)
    assert float(parts["positions"]) == BATCH * TIME
    last = bh.objective(
        MODEL,
        bh.losses.softmax_cross_entropy,
        metrics={"last": lambda logits, *_: Last(logits[-1, -1, 0])},
    )
    terms, _ = bh.accumulate(bh.value_and_grad(last), 3).evaluate(parameters(True), batch())
    assert_close(terms.measured()["last"], MODEL(parameters(True), batch()["inputs"])[-1, -1, 0])


def test_nothing_seen_is_a_loss_of_zero_with_a_gradient_of_zero():
    value, metrics, collected = compiled(3, False)(parameters(False), batch(jnp.zeros(BATCH)))
    assert (value, metrics["accuracy"]) == (0, 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(collected))


def terms_of_two():
    """A loss of two terms, each with its own weights: squared and absolute error."""

    def both(f, g):
        def apply(p, t, weights):
            return tuple(
                dict(zip("ab", pair, strict=True))
                for pair in zip(f(p, t, weights["a"]), g(p, t, weights["b"]), strict=True)
            )

        return apply

    squared, absolute = bh.losses.mean_squared_error, bh.losses.mean_absolute_error

    def forward(p, t, weights):
        (sum_a, res_a), (sum_b, res_b) = (
            squared.forward(p, t, weights["a"]),
            absolute.forward(p, t, weights["b"]),
        )
        y = tuple({"a": a, "b": b} for a, b in zip(sum_a, sum_b, strict=True))
        return y, (res_a, res_b)

    def backward(residuals, dy):
        errors = [
            op.backward(res, tuple(part[name] for part in dy))
            for op, res, name in zip((squared, absolute), residuals, "ab", strict=True)
        ]
        return errors[0][0] + errors[1][0], None, None

    return bh.Loss("two terms", forward, backward, both(squared.reference, absolute.reference))


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
def test_terms_of_a_loss_are_each_divided_by_their_own_weight(x64, gradients):
    objective = bh.objective(MODEL, terms_of_two())
    data = {
        "inputs": normal(0, BATCH, 4),
        "targets": normal(1, BATCH, 5),
        "weights": {"a": jnp.arange(12.0), "b": jnp.zeros(BATCH).at[3].set(1)},
    }
    params = parameters(True)

    @jax.jit
    def run(params, data):
        evaluation = bh.value_and_grad(objective, gradients=gradients)
        return (
            bh.accumulate(evaluation, 5)(params, data),
            jax.value_and_grad(lambda p: objective(p, data))(params),
        )

    assert_close(*run(params, data))


def test_low_precision_gradients_are_summed_in_float32():
    """A bfloat16 sum of 1024 equal parts, with its 8 bits, stops at half."""
    objective = bh.objective(bh.dense(1, bias=False), bh.losses.mean_absolute_error)
    inputs = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (1024, 4)), jnp.bfloat16)
    data = {"inputs": inputs, "targets": jnp.full((1024, 1), -9, jnp.bfloat16)}
    params = {"w": jnp.ones((4, 1), jnp.bfloat16)}
    _, grads = bh.accumulate(bh.value_and_grad(objective), 1024)(params, data)
    truth = np.asarray(inputs, np.float64).mean(0)[:, None]
    assert grads["w"].dtype == jnp.bfloat16
    assert np.abs(np.asarray(grads["w"], float) / truth - 1).max() < 2**-8
    parts = inputs / jnp.bfloat16(1024)
    in_bfloat16, _ = jax.lax.scan(lambda total, part: (total + part, None), parts[0], parts[1:])
    assert np.abs(np.asarray(in_bfloat16, float)[:, None] / truth - 1).min() > 0.3


def test_every_micro_batch_has_its_own_key(x64):
    noisy = bh.objective(bh.chain(bh.dense(4), bh.dropout(0.5)), bh.losses.mean_squared_error)
    data = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 4))}
    params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}, ()

    @jax.jit
    def run(key):
        return [
            bh.accumulate(bh.value_and_grad(noisy, gradients=kind), 4)(params, data, key=key)
            for kind in ("manual", "automatic")
        ]

    manual, automatic = run(jax.random.key(0))
    assert_close(manual, automatic)
    # One mask for all would give every column of the weights 0 or 4 kept examples.
    kept = manual[1][0]["b"] / jnp.max(manual[1][0]["b"])
    assert len(np.unique(kept.round(6))) > 2
    assert not np.array_equal(run(jax.random.key(1))[0][1][0]["b"], manual[1][0]["b"])


def test_statistics_add_up_over_micro_batches_that_see_the_same_input(x64):
    objective = bh.objective(bh.batch_norm(), bh.losses.mean_squared_error)
    data = {"inputs": normal(0, 12, 3), "targets": normal(1, 12, 3)}
    params = objective.init(jax.random.key(0), data)
    evaluation = bh.value_and_collect(objective, statistics=bh.statistics)
    _, parts = bh.accumulate(evaluation, 4)(params, data)
    merged = bh.merge_statistics(params, parts["statistics"])["running"]
    assert_close(merged.mean, 0.01 * data["inputs"].mean(0))
    assert_close(merged.var, 0.99 + 0.01 * data["inputs"].var(0))


# What is dropped, and what is refused -------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
def test_a_micro_batch_that_is_not_finite_can_be_dropped(x64, gradients):
    data = batch(jnp.ones(BATCH))
    sick = {**data, "inputs": data["inputs"].at[4].set(jnp.inf)}
    keep = jnp.arange(BATCH) % 3 != 1
    evaluation = bh.value_and_grad(OBJECTIVE, gradients=gradients)
    evaluate = bh.accumulate(evaluation, 3, nonfinite="drop").evaluate
    terms, collected = jax.jit(evaluate)(parameters(True), sick)
    truth = jax.jit(evaluation)(parameters(True), {**data, "weights": keep})
    assert_close((terms.mean(), collected["gradients"]), truth)
    assert int(terms.measured()["dropped"]) == 1
    assert jnp.isnan(jax.jit(bh.accumulate(evaluation, 3))(parameters(True), sick)[0])


def test_what_cannot_be_accumulated_is_refused(unchecked, nothing_compiles):
    evaluation = bh.value_and_grad(OBJECTIVE)
    params, data = np.ones(3, np.float32), {"inputs": np.ones((10, 3)), "targets": np.ones(10)}
    with nothing_compiles():
        with pytest.raises(ValueError, match="at least 1 micro-batch, got 0"):
            bh.accumulate(evaluation, 0)
        with pytest.raises(TypeError, match=r"must be a whole number, got 2\.0"):
            bh.accumulate(evaluation, 2.0)
        with pytest.raises(TypeError, match="a value and its gradient"):
            gradient = jax.grad(lambda params, part: jnp.sum(params))
            jax.eval_shape(bh.accumulate(gradient, 2), params, data)
        with pytest.raises(TypeError, match=r"such as bh\.value_and_grad"):
            bh.accumulate(None, 2)
        with pytest.raises(ValueError, match="'keep' or 'drop', got 'skip'"):
            bh.accumulate(evaluation, 2, nonfinite="skip")
        with pytest.raises(TypeError, match="weight is for other functions"):
            bh.accumulate(evaluation, 2, weight=lambda part: 1.0)
        with pytest.raises(TypeError, match="weight must be a function of a micro-batch, got 'w'"):
            bh.accumulate(jax.grad, 2, weight="w")
        mean = jax.value_and_grad(lambda params, part: jnp.sum(params))
        with pytest.raises(TypeError, match="must be a whole number, got True"):
            bh.accumulate(evaluation, True)
        with pytest.raises(ValueError, match="a floating-point one, got int32"):
            bh.accumulate(evaluation, 2, dtype=jnp.int32)
        with pytest.raises(TypeError, match=r"dtype must be one such as jnp\.bfloat16, got 'bf16'"):
            bh.accumulate(evaluation, 2, dtype="bf16")
        with pytest.raises(ValueError, match=r"dtype=float64 needs .*'jax_enable_x64'"):
            bh.accumulate(evaluation, 2, dtype=jnp.float64)
        dropping = bh.accumulate(evaluation, 2, nonfinite="drop")
        for again in (
            lambda: bh.accumulate(dropping, 2),
            lambda: bh.accumulator(dropping, 2, nonfinite="drop"),
        ):
            with pytest.raises(ValueError, match="an evaluation that leaves nothing out"):
                again()
        with pytest.raises(TypeError, match=r"\(\(sum, weight\), gradient.*a mean needs weight="):
            jax.eval_shape(bh.accumulate(mean, 2), params, data)
