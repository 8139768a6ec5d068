"""Focal losses: the cross-entropy at gamma 0, less of what is right already above it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal

SIGMOID, SOFTMAX = bh.losses.sigmoid_focal, bh.losses.softmax_focal


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, None), (2.0, 0.25), (1.5, 0.75), (0.0, None)])
def test_the_binary_one_is_what_optax_has(x64, gamma, alpha):
    x, t = 2 * normal(0, 4, 3), labels(1, 2, 4, 3).astype(float)

    def ours(x):
        return SIGMOID(x, t, gamma=gamma, alpha=alpha)[0]

    def theirs(x):
        return optax.losses.sigmoid_focal_loss(x, t, alpha=alpha, gamma=gamma).sum()

    assert_close(jax.value_and_grad(ours)(x), jax.value_and_grad(theirs)(x))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_two_classes_are_one_logit(x64, gamma):
    x, t = 2 * normal(0, 5), labels(1, 2, 5)
    both = jnp.stack([jnp.zeros(5), x], -1)
    assert_close(SOFTMAX(both, t, gamma=gamma), SIGMOID(x, t, gamma=gamma), 1e-11)


def test_gamma_zero_is_the_cross_entropy(x64):
    x, t = normal(0, 5, 4), labels(1, 4, 5)
    ours = jax.value_and_grad(lambda x: SOFTMAX(x, t, gamma=0.0)[0])(x)
    assert_close(ours, jax.value_and_grad(lambda x: bh.losses.softmax_cross_entropy(x, t)[0])(x))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_extreme_logits_give_finite_blames(gamma):
    x = jnp.asarray([[200.0, -200.0], [-200.0, 200.0]])
    for loss, targets in (
        (SIGMOID, jnp.asarray([[1, 0], [1, 0]])),
        (SOFTMAX, jnp.asarray([0, 0])),
    ):
        total, dx = jax.value_and_grad(lambda x, f=loss, t=targets: f(x, t, gamma=gamma)[0])(x)
        assert np.isfinite(total) and np.isfinite(dx).all()
        assert not dx[0].any() and dx[1].all()


def test_what_is_right_already_is_blamed_less():
    x, t = jnp.asarray([[2.0, 0.0], [0.0, 2.0]]), jnp.asarray([0, 0])
    plain, focal = (
        jax.grad(lambda x, g=gamma: SOFTMAX(x, t, gamma=g)[0])(x) for gamma in (0.0, 2.0)
    )
    right, wrong = np.abs(focal / plain)[:, 0]
    assert right < 0.15 < 0.7 < wrong


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_that_does_not_exist_is_noticed_unless_it_has_no_weight(label):
    x, t = normal(0, 2, 2), jnp.asarray([label, 0])
    total, dx = jax.value_and_grad(lambda x: SOFTMAX(x, t)[0])(x)
    assert np.isnan(total) and np.isfinite(dx).all() and not dx[0].any()
    assert np.isfinite(SOFTMAX(x, t, jnp.asarray([0.0, 1.0]))[0])


def test_what_does_not_fit_is_refused(unchecked):
    shape = jax.ShapeDtypeStruct
    x, bits = shape((3, 4), "float32"), shape((3, 4), "int32")
    with pytest.raises(ValueError, match="gamma of 0 or more, got -1"):
        jax.eval_shape(SIGMOID.bind(gamma=-1.0), x, bits)
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\], or None; got 2"):
        jax.eval_shape(SIGMOID.bind(alpha=2.0), x, bits)
    with pytest.raises(ValueError, match=r"integer labels of shape \(3,\)"):
        jax.eval_shape(SOFTMAX, x, bits)


def test_what_is_nearly_certain_keeps_its_digits():
    """1 - sigmoid of 12 has half of them; autodiff of the textbook form is off by 1e-4."""
    x = jnp.linspace(-12, 12, 97)
    for truth in (0, 1):
        t = jnp.full(97, truth)
        own = jax.grad(lambda x, t=t: SIGMOID(x, t)[0])(x)
        with jax.enable_x64(True):
            wide = jnp.asarray(np.asarray(x, float))
            exact = jax.grad(lambda x, t=t: SIGMOID(x, np.asarray(t))[0])(wide)
        np.testing.assert_allclose(own, np.asarray(exact), rtol=3e-6)
