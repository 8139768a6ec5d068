"""The assertions for anyone's training code pass what is right, and name what is not."""

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh
from tests.support import labels, normal

OBJECTIVE = bh.objective(
    bh.chain(bh.dense(4), bh.tanh(), bh.dense(3)), bh.losses.softmax_cross_entropy
)


gradient = jax.jit(jax.grad(OBJECTIVE))


def masked():
    return {
        "inputs": normal(0, 8, 5),
        "targets": labels(1, 3, 8),
        "weights": jnp.asarray([1.0, 1, 1, 0, 0, 0, 1, 0], jnp.float32),
    }


def parameters():
    return OBJECTIVE.init(jax.random.key(0), masked())


def ours(batch, micro_batches):
    evaluation = bh.accumulate(bh.value_and_grad(OBJECTIVE), micro_batches)
    return jax.jit(evaluation)(parameters(), batch)


def by_multi_steps(batch, micro_batches):
    """The update that plain descent makes of means of micro-batches, averaged by Optax."""
    params = parameters()
    rule = optax.MultiSteps(optax.sgd(1.0), micro_batches)
    state, updates = rule.init(params), None
    for k in range(micro_batches):
        part = jax.tree.map(lambda leaf, k=k: leaf[k::micro_batches], batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(gradient(params, part), state, params)
    return updates


def test_an_exact_accumulation_passes():
    bh.testing.assert_accumulation_exact(ours, masked(), splits=[1, 2, 4])
    bh.testing.assert_accumulation_exact(ours, masked(), splits=[1, 3, 5])


def test_a_whole_training_step_passes():
    def step(batch, micro_batches):
        rule = optax.adam(1e-2)
        state = bh.train_state(parameters(), rule, key=jax.random.key(0))
        state, metrics = bh.train_step(OBJECTIVE, rule, accumulate=micro_batches)(state, batch)
        return state, metrics["loss"]

    bh.testing.assert_accumulation_exact(step, masked(), rtol=1e-4)


def test_a_mean_of_means_is_named():
    message = (
        r"^2 micro-batches instead of 1 change 0/b by 0\.\d+ .* a mean over .*: add up the sums"
    )
    with pytest.raises(AssertionError, match=message):
        bh.testing.assert_accumulation_exact(by_multi_steps, masked())


def test_equal_weights_hide_a_mean_of_means():
    equal = {**masked(), "weights": jnp.ones(8)}
    bh.testing.assert_accumulation_exact(by_multi_steps, equal)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda batch, k: {"a": batch * k},
            "2 .* change a by 1 of .* 2 times .* not divided by the",
        ),
        (lambda batch, k: batch / k, "by 0.5 of .* it is 0.5 times .* divided .* once too often"),
        (lambda batch, k: batch * float(k == 1), "by 1 of its .* a mean over micro-batches"),
        (lambda batch, k: jnp.ones(k), r"the result: \(1,\) becomes \(2,\) at 2"),
        (lambda batch, k: {"a": 1.0, "b": 1.0} if k == 1 else {"a": 1.0}, "another structure"),
        (lambda batch, k: batch if k == 1 else batch * jnp.nan, "the result is not finite at 2"),
        (lambda batch, k: batch * jnp.inf, "the result is not finite at 1"),
        (lambda batch, k: jnp.int32(1_000_000 + k), "change the result by 1e-06"),
        (lambda batch, k: batch.astype([0, "f4", "bfloat16"][k]), "float32 becomes bfloat16 at 2"),
    ],
    ids=[
        "sums",
        "twice divided",
        "values",
        "shapes",
        "structure",
        "nan",
        "infinity",
        "integers",
        "dtypes",
    ],
)
def test_every_difference_is_caught(wrong, message):
    with pytest.raises(AssertionError, match=message):
        bh.testing.assert_accumulation_exact(wrong, jnp.ones(3), splits=[1, 2])


def test_a_difference_below_the_tolerance_passes():
    def rounded(batch, micro_batches):
        return batch * (1 + 1e-6 * micro_batches)

    bh.testing.assert_accumulation_exact(rounded, jnp.ones(3))
    with pytest.raises(AssertionError, match="change the result by"):
        bh.testing.assert_accumulation_exact(rounded, jnp.ones(3), rtol=1e-7)


@pytest.mark.parametrize("splits", [[4], [2, 2]])
def test_one_split_has_nothing_to_be_compared_with(splits):
    with pytest.raises(ValueError, match=r"two or more different splits, got \["):
        bh.testing.assert_accumulation_exact(ours, masked(), splits=splits)


def test_splits_are_numbers(unchecked):
    with pytest.raises(TypeError, match="splits is a list of numbers of micro-batches, got 4"):
        bh.testing.assert_accumulation_exact(ours, masked(), splits=4)


def test_a_step_of_other_arguments_is_refused_with_what_is_called(unchecked):
    def sum_of(params, batch, micro_batches):
        return params + batch * micro_batches

    message = (
        r"step\(batch, micro_batches\).*; got one of \(params, batch, .* lambda batch, k: step"
    )
    with pytest.raises(TypeError, match=message):
        bh.testing.assert_accumulation_exact(sum_of, masked())
    with pytest.raises(TypeError, match=r"needs a function step\(batch, .*; got None"):
        bh.testing.assert_accumulation_exact(None, masked())
    with pytest.raises(TypeError, match="'int' object is not") as caught:
        bh.testing.assert_accumulation_exact(lambda state, batch: batch["inputs"], masked())
    assert "called step(batch, micro_batches=1)" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="gave nothing to compare"):
        bh.testing.assert_accumulation_exact(lambda batch, micro_batches: None, masked())


def test_what_is_zero_but_for_rounding_has_no_relative_error():
    """The bias of an attention's keys has a gradient of zero: the softmax does not see it."""
    attention = bh.objective(
        bh.chain(bh.multi_head_attention(1), bh.dense(3)), bh.losses.softmax_cross_entropy
    )
    weights = jnp.asarray([1, 0, 2, 0.5, 0, 1, 3, 1])
    batch = {"inputs": normal(0, 8, 6, 5), "targets": labels(1, 3, 8, 6), "weights": weights}
    params = attention.init(jax.random.key(0), batch)

    def step(batch, micro_batches):
        return jax.jit(bh.accumulate(bh.value_and_grad(attention), micro_batches))(params, batch)

    bh.testing.assert_accumulation_exact(step, batch)


def test_a_difference_in_a_small_leaf_is_caught():
    def step(batch, micro_batches):
        return {"large": jnp.ones(3), "small": 1e-4 * batch * (1 + 0.1 * (micro_batches > 1))}

    with pytest.raises(AssertionError, match=r"change small by 0\.1 of"):
        bh.testing.assert_accumulation_exact(step, jnp.ones(3))
