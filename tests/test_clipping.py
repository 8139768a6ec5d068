"""Every example's gradient is clipped to a norm, from the one reverse pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal, spread

BATCH = 6
MODEL = bh.chain(bh.dense(5), bh.tanh(), bh.layer_norm(), bh.dense(3))
OBJECTIVE = bh.objective(MODEL, bh.losses.softmax_cross_entropy)
WEIGHTS = jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], jnp.float32)


def classification(weights=WEIGHTS, time=()):
    data = {"inputs": normal(0, BATCH, *time, 4), "targets": labels(1, 3, BATCH, *time)}
    return data if weights is None else {**data, "weights": weights}


def start(objective, data):
    return spread(objective.init(jax.random.key(0), data))


def max_of(weights):
    return jnp.max(jnp.stack(weights))


@functools.partial(jax.jit, static_argnums=0)
def each_gradient(objective, params, data):
    """The gradients (B, ...) of every example's sum of losses, by `jax.vmap(jax.grad)`.

    Of a loss of several terms, each times the largest weight of a term over its own.
    """
    weights = jax.tree.leaves(objective.forward(params, data)[0].weight)

    def total(params, example):
        terms, _ = objective.forward(params, jax.tree.map(lambda x: x[None], example))
        shares = [max_of(weights) / w for w in weights]
        return sum(s * t for s, t in zip(shares, jax.tree.leaves(terms.total), strict=True))

    return jax.vmap(jax.grad(total), (None, 0))(params, data)


@functools.partial(jax.jit, static_argnums=(0, 3))
def clipped_by_vmap(objective, params, data, norm):
    """(loss, clipped gradient, share clipped), from a gradient for each example."""
    each = each_gradient(objective, params, data)
    clipped, count = optax.per_example_global_norm_clip(each, norm)
    weight = max_of(jax.tree.leaves(objective.forward(params, data)[0].weight))
    counted = jnp.sum(jax.vmap(optax.tree.norm)(each) > 0)
    grads = jax.tree.map(lambda g: g / weight, clipped)
    return objective(params, data), grads, count / counted


def combined(squared=False, model=MODEL):
    """Two objectives of one weight, or the second with the squares of the first's weights."""
    loss = bh.losses.softmax_cross_entropy
    smooth = loss.bind(label_smoothing=0.3)
    if squared:
        smooth = bh.Loss(
            "squared_weights",
            lambda p, t, w: loss.forward(p, t, w**2),
            lambda residuals, dy: loss.backward(residuals, dy),
            lambda p, t, w: loss.reference(p, t, w**2),
        )
    objectives = {"plain": bh.objective(model, loss), "other": bh.objective(model, smooth)}
    return bh.combine(objectives, {"plain": 1.0, "other": -0.5})


def clipped(objective, params, data, norm, micro_batches=1):
    evaluation = bh.accumulate(bh.value_and_clipped_grad(objective, norm), micro_batches)
    terms, collected = jax.jit(evaluation.evaluate)(params, data)
    return terms.mean(), collected["gradients"], terms.measured()["clipped"]


@pytest.mark.parametrize(
    ("norm", "micro_batches"), [(0.05, 1), (1.0, 1), (100.0, 3), (1.0, 3), (1.0, 4)]
)
def test_clipping_is_that_of_a_gradient_for_each_example(x64, norm, micro_batches):
    data = classification()
    params = start(OBJECTIVE, data)
    ours = clipped(OBJECTIVE, params, data, norm, micro_batches)
    truth = clipped_by_vmap(OBJECTIVE, params, data, norm)
    assert_close(ours[:2], truth[:2])
    assert abs(float(ours[2]) - float(truth[2])) < 1e-6
    assert float(ours[2]) == {0.05: 1.0, 100.0: 0.0}.get(norm, float(ours[2]))


CASES = {
    "time inside an example": (MODEL, (3,)),
    "repeated layers": (bh.chain(bh.repeat(bh.skip(bh.dense(4)), 3), bh.dense(3)), ()),
    "a shared layer": (
        bh.chain(bh.share(bh.chain(a=bh.dense(4), b=bh.dense(4)), {"b": "a"}), bh.dense(3)),
        (),
    ),
}


@pytest.mark.parametrize(("model", "time"), CASES.values(), ids=CASES)
def test_any_model_is_clipped(x64, model, time):
    objective = bh.objective(model, bh.losses.softmax_cross_entropy)
    data = classification(time=time)
    params = start(objective, data)
    norm = float(jnp.median(jax.vmap(optax.tree.norm)(each_gradient(objective, params, data))))
    ours = clipped(objective, params, data, norm)
    assert_close(ours[:2], clipped_by_vmap(objective, params, data, norm)[:2])
    assert 0 < float(ours[2]) < 1


@pytest.mark.parametrize(("squared", "time", "micro_batches"), [(True, (), 3), (False, (3,), 1)])
def test_the_terms_of_a_loss_are_clipped_together(x64, squared, time, micro_batches):
    objective, data = combined(squared), classification(time=time)
    params = start(objective, data)
    norm = float(jnp.median(jax.vmap(optax.tree.norm)(each_gradient(objective, params, data))))
    ours = clipped(objective, params, data, norm, micro_batches)
    assert_close(ours[:2], clipped_by_vmap(objective, params, data, norm)[:2])
    assert 0 < float(ours[2]) < 1


def test_an_embedding_is_clipped(x64):
    model = bh.chain(bh.embedding(7, 4), bh.dense(3))
    objective = bh.objective(model, bh.losses.softmax_cross_entropy)
    data = {"inputs": labels(0, 7, BATCH, 5), "targets": labels(1, 3, BATCH, 5)}
    params = start(objective, data)
    ours = clipped(objective, params, data, 2.0)
    assert_close(ours[:2], clipped_by_vmap(objective, params, data, 2.0)[:2])


def test_a_large_norm_gives_the_plain_gradient(x64):
    data = classification()
    params = start(OBJECTIVE, data)
    ours = clipped(OBJECTIVE, params, data, 1e6)[:2]
    assert_close(ours, jax.jit(bh.value_and_grad(OBJECTIVE))(params, data))


def test_one_example_cannot_move_the_gradient_by_more_than_the_norm(x64):
    data = classification(None)
    params = start(OBJECTIVE, data)
    wild = {**data, "inputs": data["inputs"].at[2].mul(1e6)}
    evaluate = jax.jit(bh.value_and_clipped_grad(OBJECTIVE, 0.1))
    gradients = [evaluate(params, d)[1] for d in (data, wild)]
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, *gradients))
    assert 0 < float(moved) <= 2 * 0.1 / BATCH * (1 + 1e-12)


def test_parameters_outside_the_mask_have_no_part_in_the_norm(x64):
    data = classification()
    params = start(OBJECTIVE, data)

    def last(params):
        return tuple(jax.tree.map(lambda _, i=i: i == 3, p) for i, p in enumerate(params))

    _, grads = jax.jit(bh.value_and_clipped_grad(OBJECTIVE, 0.2, mask=last))(params, data)
    each = each_gradient(OBJECTIVE, params, data)[3]
    truth, _ = optax.per_example_global_norm_clip(each, 0.2)
    weight = jnp.sum(WEIGHTS.astype(float))
    assert_close(grads[3], jax.tree.map(lambda g: g / weight, truth))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads[:3]))


def test_running_statistics_are_gathered_beside_the_clipped_gradient(x64):
    objective = bh.objective(
        bh.chain(bh.dense(4), bh.batch_norm(), bh.dense(3)), bh.losses.softmax_cross_entropy
    )
    data = classification(None)
    params = objective.init(jax.random.key(0), data)
    collect = bh.value_and_collect(objective, gradients=bh.gradients, statistics=bh.statistics)
    _, plain = jax.jit(collect.evaluate)(params, data)
    _, ours = jax.jit(bh.value_and_clipped_grad(objective, 1e6).evaluate)(params, data)
    assert_close(ours, plain)


@pytest.mark.parametrize("objective", [OBJECTIVE, combined()], ids=["one term", "two terms"])
def test_nothing_seen_is_clipped_to_nothing(objective):
    data = classification(jnp.zeros(BATCH))
    value, grads, share = clipped(objective, start(OBJECTIVE, data), data, 1.0, 3)
    assert (float(value), float(share)) == (0, 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_low_precision_activations_are_clipped_in_float32():
    data = classification()
    params = start(OBJECTIVE, data)
    low = {**data, "inputs": data["inputs"].astype(jnp.bfloat16)}
    _, grads = jax.jit(bh.value_and_clipped_grad(OBJECTIVE, 0.5))(params, low)
    _, truth, _ = clipped_by_vmap(OBJECTIVE, params, data, 0.5)
    for ours, right in zip(jax.tree.leaves(grads), jax.tree.leaves(truth), strict=True):
        assert ours.dtype == jnp.float32
        assert np.abs(ours - right).max() < 0.05 * np.abs(right).max()


def summed_dense(transposed=False):
    """A dense layer whose rule sums over the batch itself."""

    def forward(params, x):
        return x @ params, x.T if transposed else x

    def backward(params, x, dy):
        x = x.T if transposed else x
        return x.T @ dy, dy @ params.T

    return bh.layer("summed", lambda key, x: jnp.zeros((x.shape[-1], 4)), forward, backward)


@pytest.mark.filterwarnings("ignore:a rule gives summed arrays")
def test_a_rule_that_sums_is_clipped_one_example_at_a_time(x64):
    model = bh.chain(bh.repeat(summed_dense(), 2), bh.layers.standardized(bh.dense(3)))
    objective = bh.objective(model, bh.losses.softmax_cross_entropy)
    data = classification()
    params = start(objective, data)
    norm = float(jnp.median(jax.vmap(optax.tree.norm)(each_gradient(objective, params, data))))
    ours = clipped(objective, params, data, norm, 3)
    assert_close(ours[:2], clipped_by_vmap(objective, params, data, norm)[:2])
    assert 0 < float(ours[2]) < 1


def test_what_cannot_be_clipped_is_refused():
    with pytest.raises(ValueError, match="norm above 0, got 0"):
        bh.value_and_clipped_grad(OBJECTIVE, 0.0)
    evaluation, data = bh.value_and_clipped_grad(combined(), 1.0), classification()
    params = start(OBJECTIVE, data)
    message = "over several terms of a loss is clipped as a whole.* use nonfinite='skip' in bh"
    with pytest.raises(ValueError, match=message):
        bh.accumulate(evaluation, 2, nonfinite="drop")(params, data)
    with pytest.raises(ValueError, match=message):
        bh.accumulator(evaluation, 2).init(params, data)
    sums = combined(model=bh.chain(summed_dense(), bh.dense(3)))
    with pytest.raises(
        TypeError, match=r"with a batch axis .* got an array, summed over the batch"
    ):
        bh.value_and_clipped_grad(sums, 1.0)(start(sums, data), data)
    plain = bh.objective(summed_dense(transposed=True), bh.losses.softmax_cross_entropy)
    with pytest.raises(ValueError, match="residuals that all have the batch as their first axis"):
        bh.value_and_clipped_grad(plain, 1.0)(start(plain, data), data)
