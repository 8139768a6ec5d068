"""Kullback-Leibler divergence: values, logarithms of targets, classes without probability."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, normal

KL, CE = bh.losses.kl_divergence, bh.losses.softmax_cross_entropy


def blame(loss, x, t, **static):
    return jax.grad(lambda x: loss(x, t, **static)[0])(x)


def test_it_is_what_optax_has(x64):
    x, t = normal(0, 3, 4, 5), jax.nn.softmax(normal(1, 3, 4, 5))
    total, weight = KL(x, t)
    assert_close(total, optax.losses.kl_divergence(jax.nn.log_softmax(x), t).sum())
    assert float(weight) == 12
    theirs = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(x), jnp.log(t)).sum()
    assert_close(KL(x, jnp.log(t), log_targets=True)[0], theirs)


def test_log_probabilities_are_logits(x64):
    x, t = normal(0, 3, 5), jax.nn.softmax(normal(1, 3, 5))
    assert_close(KL(jax.nn.log_softmax(x), t), KL(x, t))


def test_it_is_zero_without_blame_where_the_two_agree(x64):
    x = normal(0, 3, 5)
    assert abs(float(KL(x, jax.nn.softmax(x))[0])) < 1e-14
    assert np.abs(blame(KL, x, jax.nn.softmax(x))).max() < 1e-15


def test_the_blame_is_the_cross_entropys(x64):
    x, t = normal(0, 3, 5), jax.nn.softmax(normal(1, 3, 5))
    assert_close(blame(KL, x, t), blame(CE, x, t))
    assert_close(blame(KL, x, jnp.log(t), log_targets=True), blame(CE, x, t))


def test_a_class_without_probability_adds_nothing():
    x, t = jnp.asarray([[0.0, 0.0, -jnp.inf]]), jnp.asarray([[1.0, 0.0, 0.0]])
    assert float(KL(x, t)[0]) == pytest.approx(np.log(2))
    assert blame(KL, x, t).tolist() == [[-0.5, 0.5, 0.0]]
    log_t = jnp.log(t)
    assert float(KL(x, log_t, log_targets=True)[0]) == pytest.approx(np.log(2))
    for rule in (KL, KL.reference):
        dt = jax.grad(lambda t, rule=rule: rule(x, t, log_targets=True)[0])(log_t)
        assert np.isfinite(dt).all() and dt[0, 1:].tolist() == [0, 0]


def test_a_position_of_weight_zero_is_left_out_whatever_is_in_it(x64):
    x, t, w = normal(0, 3, 5), jax.nn.softmax(normal(1, 3, 5)), jnp.asarray([1.0, 0.0, 2.0])
    sick = x.at[1].set(jnp.nan)
    assert_close(KL(sick, t, w), KL(x, t, w))
    assert_close(jax.grad(lambda x: KL(x, t, w)[0])(sick), jax.grad(lambda x: KL(x, t, w)[0])(x))


def test_what_is_no_pair_is_refused(unchecked):
    shape = jax.ShapeDtypeStruct
    x = shape((3, 4), "float32")
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4\) and \(3,\)"):
        jax.eval_shape(KL, x, shape((3,), "int32"))
    with pytest.raises(TypeError, match="floating-point log_targets, got int32"):
        jax.eval_shape(KL.bind(log_targets=True), x, shape((3, 4), "int32"))
    with pytest.raises(ValueError, match="got a scalar"):
        jax.eval_shape(KL, shape((), "float32"), shape((), "float32"))
