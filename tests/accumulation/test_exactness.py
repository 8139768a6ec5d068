"""Accumulation is exact: low precision, many micro-batches, ragged, sick and empty ones."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import backhand as bh
from backhand.accumulate import of_terms
from backhand.metrics import Last, Max, Mean, Sum
from tests.support import assert_close, labels, normal, spread, temporary_bytes
from tests.tolerances import tolerance

MODEL = bh.chain(bh.dense(6), bh.gelu(), bh.layer_norm(), bh.dense(3))
OBJECTIVE = bh.objective(MODEL, bh.losses.softmax_cross_entropy)
EVALUATION = bh.value_and_grad(OBJECTIVE)


def classification(rows, weights=None, seed=0):
    data = {"inputs": normal(seed, rows, 4), "targets": labels(seed + 1, 3, rows)}
    return data if weights is None else {**data, "weights": jnp.asarray(weights, jnp.float32)}


@functools.cache
def initial(objective):
    """The parameters in float32 or, where that is enabled, float64."""
    return objective.init(jax.random.key(0), classification(4))


def parameters(objective=OBJECTIVE):
    return spread(initial(objective))


@functools.cache
def compiled(micro_batches, gradients):
    return jax.jit(bh.accumulate(bh.value_and_grad(OBJECTIVE, gradients=gradients), micro_batches))


# Any split, mask and weights ----------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
@given(weights=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 50.0]), min_size=11, max_size=11))
@settings(max_examples=20)
def test_float32_agrees_with_the_whole_batch_to_a_millionth(gradients, weights):
    data = classification(11, weights)
    params = parameters()
    ours = compiled(4, gradients)(params, data)
    whole = compiled(1, gradients)(params, data)
    norm = float(max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(whole)))
    assert_close(ours, whole, 1e-6, floor=1e-6 * norm)


COUNTING = {
    "count": lambda p, t, w=None: Sum(jnp.asarray(float(len(t)))),
    "unweighted": lambda p, t, w=None: Mean(jnp.sum(p), jnp.asarray(float(p.size))),
}
RAGGED = bh.value_and_collect(
    bh.objective(MODEL, bh.losses.softmax_cross_entropy, metrics=COUNTING),
    grads=bh.gradients,
    norms=bh.square_norms,
)


@pytest.mark.parametrize(("rows", "micro_batches"), [(7, 2), (7, 3), (7, 5), (3, 5)])
def test_a_batch_that_does_not_divide_is_exact_in_all_that_is_measured(x64, rows, micro_batches):
    data, params = classification(rows), parameters()

    def run(evaluation):
        terms, collected = jax.jit(evaluation.evaluate)(params, data)
        return terms.mean(), terms.measured(), collected

    assert_close(run(bh.accumulate(RAGGED, micro_batches)), run(RAGGED))


def test_running_statistics_see_every_example_once(x64):
    """The last example is far from the others: copies of it would show."""
    objective = bh.objective(bh.batch_norm(), bh.losses.mean_squared_error)
    data = {"inputs": normal(0, 8, 3).at[-1].set(100.0), "targets": normal(1, 8, 3)}
    params = objective.init(jax.random.key(0), data)
    evaluation = bh.value_and_collect(objective, statistics=bh.statistics)
    for micro_batches in (3, 5):
        _, collected = bh.accumulate(evaluation, micro_batches)(params, data)
        seen = bh.merge_statistics(params, collected["statistics"])["running"]
        assert_close(seen.mean, 0.01 * data["inputs"].mean(0))


def test_an_objective_that_knows_no_weights_is_exact(x64):
    def forward(params, batch, *, key=None, training=True):
        error = batch["inputs"] @ params - batch["targets"]
        weight = jnp.asarray(len(error), error.dtype)
        return bh.Terms(jnp.sum(error**2), weight, {}), (batch["inputs"], error)

    def backward(params, residuals, dtotal, batch, collect=bh.gradients, **given):
        x, error = residuals

        def rule(params, x, dy):
            return x.T @ dy, None

        return collect(bh.Visit(params, x, 2 * error * dtotal, rule))[0]

    unweighted = bh.Objective(lambda key, batch: jnp.zeros(5), forward, backward)
    data, params = {"inputs": normal(0, 7, 5), "targets": normal(1, 7)}, normal(2, 5)
    whole = bh.value_and_grad(unweighted)
    assert_close(bh.accumulate(whole, 2)(params, data), whole(params, data))


# Low precision at 1,024 micro-batches -------------------------------------------------------------


def relative_error(tree, truth):
    """The largest error of a leaf, over its largest element."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(truth), strict=True)
    return max(float(np.abs(np.asarray(a, float) - b).max() / np.abs(b).max()) for a, b in pairs)


def in_float64(params, data, objective=OBJECTIVE):
    """The gradient of the whole batch in float64, of the very numbers given."""
    return both_in_float64(params, data, objective)[1]


def both_in_float64(params, data, objective):
    """Likewise the loss and its gradient."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)) if x.dtype != jnp.int32 else x,
            (params, data),
        )
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(objective))(*wide))


LINEAR = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)


def streamed(function, micro_batches):
    """An accumulator's loss and gradient, its micro-batches added in a scan."""
    window = bh.accumulator(function, micro_batches)

    def run(params, data):
        parts = jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), data)
        sums = window.init(params, jax.tree.map(lambda leaf: leaf[0], parts))
        sums, _ = jax.lax.scan(lambda s, part: (window.add(s, params, part), None), sums, parts)
        return window.divide(sums)

    return run


WAYS = {
    "keep": bh.accumulate(bh.value_and_grad(LINEAR), 1024),
    "drop": bh.accumulate(bh.value_and_grad(LINEAR), 1024, nonfinite="drop"),
    "another library's": bh.accumulate(
        jax.value_and_grad(lambda p, part: LINEAR.forward(p, part)[0][:2], has_aux=True), 1024
    ),
    "streaming": streamed(bh.value_and_grad(LINEAR), 1024),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_1024_micro_batches_of_uneven_weight_agree_with_the_whole_batch_to_a_millionth(way):
    """Summed one by one in plain float32 the weights would be off by 4e-6."""
    data = classification(2048, np.random.default_rng(0).choice([0.0, 1e-3, 1.0, 50.0], 2048))
    params = parameters(LINEAR)
    loss, grads = jax.jit(way)(params, data)
    truth = both_in_float64(params, data, LINEAR)
    assert relative_error((loss, grads), truth) < 1e-6


def test_float32_sums_of_1024_micro_batches_are_as_good_as_one_large_batch():
    data, params = classification(2048, np.random.default_rng(0).integers(0, 2, 2048)), parameters()
    truth = in_float64(params, data)
    _, grads = compiled(1024, "manual")(params, data)
    assert relative_error(grads, truth) < tolerance(jnp.float32, 2048)


def test_bfloat16_activations_are_no_worse_in_1024_micro_batches_than_in_one():
    rows = 2048
    data = classification(rows, np.random.default_rng(0).integers(0, 2, rows))
    data["inputs"] = data["inputs"].astype(jnp.bfloat16)
    params = parameters()
    truth = in_float64(params, data)
    _, whole = compiled(1, "manual")(params, data)
    _, parts = compiled(1024, "manual")(params, data)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parts))
    # The sums add nothing to the error that bfloat16 activations have.
    assert relative_error(parts, truth) < relative_error(whole, truth) + 1e-5


def test_float32_sums_of_1024_bfloat16_micro_batches_have_the_error_of_float32(x64):
    """One program, its sums in float32 and in float64."""
    objective = bh.objective(
        bh.chain(bh.dense(6), bh.relu(), bh.dense(3)), bh.losses.softmax_cross_entropy
    )
    data = classification(2048, np.random.default_rng(0).integers(0, 2, 2048))
    data["inputs"] = data["inputs"].astype(jnp.bfloat16)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), parameters(objective))
    single, double = (
        jax.jit(bh.accumulate(bh.value_and_grad(objective), 1024, dtype=dtype))(params, data)[1]
        for dtype in (jnp.float32, jnp.float64)
    )
    assert relative_error(single, jax.tree.map(np.asarray, double)) < 1e-6


# What is dropped ----------------------------------------------------------------------------------

METRICS = {
    "mean": lambda p, t, w=None: Mean(jnp.sum(p), jnp.asarray(p.size, p.dtype)),
    "sum": lambda p, t, w=None: Sum(jnp.sum(p)),
    "max": lambda p, t, w=None: Max(jnp.max(p)),
    "last": lambda p, t, w=None: Last(p[-1]),
}
MEASURED = bh.objective(MODEL, bh.losses.softmax_cross_entropy, metrics=METRICS)
DROPPING = bh.accumulate(bh.value_and_grad(MEASURED), 4, nonfinite="drop")


def sick(rows, *places):
    data = classification(rows, np.ones(rows))
    return {**data, "inputs": data["inputs"].at[jnp.asarray(places)].set(jnp.nan)}


@pytest.mark.parametrize("places", [(1,), (0, 7), (2, 6), (1, 2, 3)], ids=str)
def test_what_is_dropped_takes_its_weight_and_metrics_along(x64, places):
    bad = {place % 4 for place in places}
    kept = jnp.asarray([row for row in range(8) if row % 4 not in bad])
    params, data = parameters(), sick(8, *places)
    # All logits below zero: a part that is dropped must not count as a maximum of zero.
    params = (*params[:3], {**params[3], "b": params[3]["b"] - 100})
    terms, collected = jax.jit(DROPPING.evaluate)(params, data)
    healthy = jax.tree.map(lambda leaf: leaf[kept], data)
    whole, gradient = jax.jit(bh.value_and_grad(MEASURED).evaluate)(params, healthy)
    assert_close((terms.mean(), collected), (whole.mean(), gradient))
    measured, expected = terms.measured(), whole.measured()
    assert int(measured.pop("dropped")) == len(bad)
    last = max(row for row in range(4) if row not in bad) + 4
    expected["last"] = MODEL(params, data["inputs"][last : last + 1])[0]
    assert_close(measured, expected)


def test_nothing_but_dropped_micro_batches_is_a_gradient_of_zero():
    terms, collected = jax.jit(DROPPING.evaluate)(parameters(), sick(8, *range(8)))
    measured = terms.measured()
    assert (float(terms.mean()), int(measured.pop("dropped"))) == (0, 4)
    assert not any(leaf.any() for leaf in jax.tree.leaves((collected, measured)))


def test_a_scale_that_is_given_is_kept_when_something_is_dropped(x64):
    params, data = parameters(), sick(8, 1)
    terms, scaled = jax.jit(DROPPING.evaluate)(params, data, scale=jnp.asarray(0.5))
    _, mean = jax.jit(DROPPING.evaluate)(params, data)
    assert float(terms.weight) == 6
    assert_close(scaled, jax.tree.map(lambda g: g * 3, mean))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_one_sick_weight_costs_its_own_micro_batch_alone(x64, bad):
    params, data = parameters(), classification(8, np.ones(8))
    terms, collected = jax.jit(DROPPING.evaluate)(
        params, {**data, "weights": data["weights"].at[0].set(bad)}
    )
    healthy = {**data, "weights": jnp.asarray(np.arange(8) % 4 != 0, float)}
    truth = jax.jit(bh.value_and_grad(MEASURED).evaluate)(params, healthy)
    assert_close((terms.mean(), collected), (truth[0].mean(), truth[1]))
    assert int(terms.measured()["dropped"]) == 1


def test_one_sick_example_at_the_end_of_a_ragged_batch_costs_its_own_micro_batch_alone():
    terms, _ = jax.jit(DROPPING.evaluate)(parameters(), sick(7, 6))
    assert int(terms.measured()["dropped"]) == 1


TWO = bh.combine(
    {
        "a": OBJECTIVE,
        "b": bh.objective(MODEL, bh.losses.softmax_cross_entropy.bind(label_smoothing=0.1)),
    },
    {"a": 1.0, "b": 0.5},
)


def test_terms_of_a_loss_are_told_apart_when_something_is_dropped(x64):
    run = bh.accumulate(bh.value_and_grad(TWO), 4, nonfinite="drop")
    params, data = parameters(), sick(8, 1)
    kept = jnp.asarray([0, 2, 3, 4, 6, 7])
    healthy = jax.tree.map(lambda leaf: leaf[kept], data)
    assert_close(jax.jit(run)(params, data), jax.jit(bh.value_and_grad(TWO))(params, healthy))
    norms = bh.value_and_collect(OBJECTIVE, norms=bh.square_norms)
    with pytest.raises(ValueError, match=r"norms: .* must add up over the terms"):
        of_terms(norms.collectors, {"norms": jnp.ones((2, 3))}, *[(jnp.ones(()),) * 2] * 2)


def test_a_batch_of_no_examples_is_a_gradient_of_zero():
    empty = jax.tree.map(lambda leaf: leaf[:0], classification(4))
    value, grads = jax.jit(bh.accumulate(EVALUATION, 2))(parameters(), empty)
    assert float(value) == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_weights_below_zero_are_refused_where_they_can_be_seen():
    data = {**classification(4), "weights": np.asarray([1, -1, 1, 1], np.float32)}
    with pytest.raises(ValueError, match=r"weights must be 0 or more, got -1.0 at \[1\]"):
        bh.accumulate(EVALUATION, 2)(parameters(), data)


# Keys and memory ----------------------------------------------------------------------------------


def test_no_two_micro_batches_share_their_noise(x64):
    micro_batches = 8

    def kept(predictions, targets, weights=None):
        return Sum(jnp.sum(2.0 ** jnp.arange(32.0) * jnp.sign(predictions[0])))

    noisy = bh.objective(
        bh.chain(bh.dropout(0.5)), bh.losses.mean_squared_error, metrics={"kept": kept}
    )
    data = {"inputs": jnp.ones((micro_batches, 32)), "targets": jnp.zeros((micro_batches, 32))}

    @jax.jit
    def masks(key):
        """The mask of each micro-batch, as a number."""

        def one(part, index):
            own = jax.random.fold_in(key, index)
            return noisy.forward(((),), part, key=own)[0].measured()["kept"]

        parts = jax.tree.map(lambda leaf: leaf[:, None], data)
        return jax.vmap(one)(parts, jnp.arange(micro_batches, dtype=jnp.int32))

    run = jax.jit(bh.accumulate(bh.value_and_grad(noisy), micro_batches).evaluate)
    key = jax.random.key(5)
    terms, _ = run(((),), data, key=key)
    assert len(set(np.asarray(masks(key)))) == micro_batches
    assert float(terms.measured()["kept"]) == float(masks(key).sum())


def test_temporary_memory_does_not_grow_with_the_number_of_micro_batches():
    """Of many: what the small sums of many lose is there once."""
    wide = bh.objective(
        bh.chain(bh.dense(256), bh.relu(), bh.dense(256), bh.relu(), bh.dense(3)),
        bh.losses.softmax_cross_entropy,
    )
    params = wide.init(jax.random.key(0), classification(16))

    def temporary(micro_batches):
        run = bh.accumulate(bh.value_and_grad(wide), micro_batches)
        return temporary_bytes(run, params, classification(16 * micro_batches))

    few, many = temporary(64), temporary(256)
    assert many < few * 1.01
