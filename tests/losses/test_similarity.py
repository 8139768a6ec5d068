"""Losses of vectors: directions, margins, and whose keys are whose negatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradients_agree, initial, normal

COSINE, TRIPLET, NCE = bh.losses.cosine_distance, bh.losses.triplet, bh.losses.info_nce


def test_cosine_and_triplet_are_what_optax_has(x64):
    a, p, n = (normal(seed, 5, 4) for seed in range(3))
    ours = jax.value_and_grad(lambda a: COSINE(a, p)[0])(a)
    theirs = jax.value_and_grad(lambda a: optax.losses.cosine_distance(a, p).sum())(a)
    assert_close(ours, theirs)
    ours = jax.value_and_grad(lambda *x: TRIPLET(x)[0], (0, 1, 2))(a, p, n)

    def by_optax(*x):
        return optax.losses.triplet_margin_loss(*x, eps=1e-6).sum()

    assert_close(ours, jax.value_and_grad(by_optax, (0, 1, 2))(a, p, n))


def test_length_has_no_blame(x64):
    x, t = normal(0, 5, 4), normal(1, 5, 4)
    for loss in (COSINE, NCE):
        dx, dt = jax.grad(lambda x, t, f=loss: f(x, t)[0], (0, 1))(x, t)
        np.testing.assert_allclose(jnp.sum(dx * x, -1), 0, atol=1e-12)
        np.testing.assert_allclose(jnp.sum(dt * t, -1), 0, atol=1e-12)
        assert_close(loss(3 * x, t / 2), loss(x, t))


def test_a_vector_of_zeros_is_far_from_all_and_has_a_finite_blame():
    x, t = jnp.zeros((1, 3)), jnp.ones((1, 3))
    total, dx = jax.value_and_grad(lambda x: COSINE(x, t)[0])(x)
    assert float(total) == 1 and np.isfinite(dx).all()
    a = jnp.ones((1, 3))
    assert np.isfinite(jax.grad(lambda a: TRIPLET((a, a, a))[0])(a)).all()


def test_a_triplet_beyond_the_margin_is_not_blamed():
    a, p, n = jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.asarray([[1.5], [3.0]])
    total, da = jax.value_and_grad(lambda a: TRIPLET((a, p, n))[0])(a)
    assert float(total) == pytest.approx(0.5, abs=1e-5)
    assert not da[1].any()


@pytest.mark.parametrize("together", [True, False])
def test_an_objective_has_triplets_of_one_encoder_and_no_targets(x64, together, nothing_compiles):
    encoder = bh.dense(2)
    apart = bh.Layer(
        "apart",
        lambda key, x: encoder.init(key, x),
        lambda params, x: (tuple(jnp.moveaxis(encoder(params, x), 1, 0)), x),
        lambda params, x, dy, collect: encoder.backward(params, x, jnp.stack(dy, 1), collect),
    )
    loss = bh.objective(encoder if together else apart, TRIPLET)
    batch = {"inputs": normal(0, 4, 3, 5), "weights": jnp.asarray([1.0, 0.0, 2.0, 1.0])}
    params = initial(encoder, batch["inputs"])
    assert_gradients_agree(loss, params, batch)
    three = tuple(encoder(params, batch["inputs"][:, i]) for i in range(3))
    total, weight = TRIPLET(three, weights=batch["weights"])
    assert_close(loss(params, batch), total / weight)
    with nothing_compiles(), pytest.raises(ValueError, match="holds 'targets', which"):
        loss(params, {**batch, "targets": np.zeros(4)})


def test_an_example_of_weight_zero_is_left_out_whatever_is_in_it(x64):
    q, k, w = normal(0, 4, 3), normal(1, 4, 3), jnp.asarray([1.0, 0.0, 2.0, 1.0])

    def both(q, k):
        return jax.value_and_grad(lambda *x: NCE(*x, w)[0], (0, 1))(q, k)

    clean = both(q, k)
    assert not clean[1][0][1].any() and not clean[1][1][1].any()
    assert_close(both(q.at[1].set(jnp.nan), k.at[1].set(jnp.inf)), clean)
    for loss in (COSINE, lambda *x: TRIPLET((*x[:2], -k), None, x[2])):
        sick = jax.grad(lambda q, f=loss: f(q, k, w)[0])(q.at[1].set(jnp.nan))
        assert_close(sick, jax.grad(lambda q, f=loss: f(q, k, w)[0])(q))


def test_what_does_not_fit_is_refused(unchecked):
    shape = jax.ShapeDtypeStruct
    x, other, ids = shape((3, 4), "float32"), shape((3, 5), "float32"), shape((3, 4), "int32")
    for call, message in (
        (lambda: jax.eval_shape(TRIPLET, (x, x, other)), r"negatives of shape \(3, 4\)"),
        (lambda: jax.eval_shape(TRIPLET, (x, x)), "D.* of them; got a tuple of 2"),
        (lambda: jax.eval_shape(TRIPLET, x), r"or one array \(B, 3, ..., D\) .* got \(3, 4\)"),
        (lambda: jax.eval_shape(TRIPLET.bind(margin=-1.0), (x, x, x)), "margin above 0, got -1"),
        (lambda: jax.eval_shape(COSINE, x, other), r"one shape, got \(3, 4\) and \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: jax.eval_shape(TRIPLET, (x, ids, x)),
        lambda: jax.eval_shape(NCE, x, ids),
        lambda: jax.eval_shape(COSINE, ids, x),
    ):
        with pytest.raises(TypeError, match=r"floating-point .*int32"):
            call()
    with pytest.raises(TypeError, match="triplet has no targets: give its three together"):
        jax.eval_shape(TRIPLET, x, x, x)
