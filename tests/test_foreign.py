"""Functions of other libraries are accumulated: sums, and means whose weights are stated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, normal


def example(rows=8):
    weights = jnp.asarray([0.0, 0, 0, 2, 1, 0, 1, 5])[:rows]
    return {"inputs": normal(0, rows, 3), "targets": normal(1, rows), "weights": weights}


def squared(params, part):
    error = part["inputs"] @ params - part["targets"]
    return jnp.sum(part["weights"] * error**2), jnp.sum(part["weights"])


def test_functions_of_other_libraries_accumulate_exactly(x64):
    data = {
        "inputs": normal(0, 8, 3),
        "targets": normal(1, 8),
        "weights": jnp.asarray([0.0, 0, 0, 2, 1, 0, 1, 5]),
    }
    params = normal(2, 3)
    truth = jax.value_and_grad(lambda p: jnp.divide(*squared(p, data)))(params)
    sums = jax.value_and_grad(squared, has_aux=True)

    def with_weight(params, part):
        (total, weight), grads = sums(params, part)
        return (total, weight), grads

    assert_close(bh.accumulate(with_weight, 4)(params, data), truth)

    def mean(params, part):
        total, weight = squared(params, part)
        return total / jnp.maximum(weight, 1e-300)

    means = bh.accumulate(jax.value_and_grad(mean), 4, weight=lambda part: part["weights"].sum())
    assert_close(jax.jit(means)(params, data), truth)


def mean_of(params, part):
    """The mean as everyone writes it: 0 / 0 of nothing."""
    return jnp.divide(*squared(params, part))


def weight_of(part):
    return part["weights"].sum()


SUMS = jax.value_and_grad(squared, has_aux=True)


@pytest.mark.parametrize("micro_batches", [3, 4, 7, 8, 20])
def test_a_batch_that_does_not_divide_is_not_filled_up(x64, micro_batches):
    params, data = normal(2, 3), example()
    counted = jax.value_and_grad(
        lambda p, part: (squared(p, part)[0], len(part["inputs"])), has_aux=True
    )
    mean = jax.value_and_grad(lambda p: squared(p, data)[0] / 8)(params)
    assert_close(jax.jit(bh.accumulate(counted, micro_batches))(params, data), mean)


@pytest.mark.parametrize("nonfinite", ["keep", "drop"])
def test_a_mean_of_nothing_is_no_part_of_the_sum(x64, nonfinite):
    params, data = normal(2, 3), example()
    function, truth = jax.value_and_grad(mean_of), jax.value_and_grad(mean_of)(params, example())
    run = bh.accumulate(function, 4, weight=weight_of, nonfinite=nonfinite)
    assert_close(jax.jit(run)(params, data), truth)
    window = bh.accumulator(function, 4, weight=weight_of, nonfinite=nonfinite)
    sums = window.init(params, data)
    for k in range(4):
        sums = window.add(sums, params, jax.tree.map(lambda leaf, k=k: leaf[k::4], data))
    assert_close(window.take(sums)[0], truth)
    assert int(sums.dropped) == 0


def test_weights_below_zero_count_as_they_are(x64):
    params, data = normal(2, 3), example()
    negative = {**data, "weights": -data["weights"]}
    mixed = {**data, "weights": data["weights"].at[3].set(-2.0)}
    run = jax.jit(bh.accumulate(SUMS, 4))
    assert_close(run(params, negative), run(params, data))
    assert_close(run(params, mixed), jax.value_and_grad(mean_of)(params, mixed))


def test_the_dropped_are_counted(x64):
    params, data = normal(2, 3), example()
    sick = {**data, "inputs": data["inputs"].at[1].set(jnp.inf)}
    run = bh.accumulate(SUMS, 4, nonfinite="drop")
    terms, grads = jax.jit(run.evaluate)(params, sick)
    assert int(terms.measured()["dropped"]) == 1
    assert_close((terms.mean(), grads), run(params, sick))
    assert bh.accumulate(SUMS, 4).evaluate(params, data)[0].metrics == {}


def test_low_precision_sums_are_divided_before_they_are_rounded():
    """4,096 ones and their count of 4,096, whose sums bfloat16 cannot tell from others."""

    def counted(params, part):
        x = part.astype(jnp.bfloat16)
        return (jnp.sum(x), jnp.sum(jnp.ones_like(x))), params * jnp.sum(x)

    params = jnp.ones(3, jnp.bfloat16)
    value, grads = bh.accumulate(counted, 1365)(params, jnp.ones(4095))
    assert float(value) == 1.0
    assert grads.dtype == jnp.bfloat16 and np.asarray(grads, float).tolist() == [1.0] * 3
