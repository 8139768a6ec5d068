"""Dice loss: a region is one loss, whatever its size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal

DICE = bh.losses.dice


def test_it_is_what_optax_has(x64):
    x, t = normal(0, 3, 4, 5, 1), labels(1, 2, 3, 4, 5, 1).astype(float)

    def theirs(x):  # 1 - (I + s) / (S / 2 + s): ours with twice the s
        return optax.losses.binary_dice_loss(x[..., 0], t[..., 0], smooth=0.5).sum()

    ours = jax.value_and_grad(lambda x: DICE(x, t, smooth=1.0)[0])(x)
    assert_close(ours, jax.value_and_grad(theirs)(x))
    assert float(DICE(x, t)[1]) == 3


def test_all_of_a_region_costs_nothing_and_none_of_it_all():
    t = jnp.asarray([[[1.0], [1.0], [0.0]]])
    for x, value in ((100 * (2 * t - 1), 0.0), (100 * (1 - 2 * t), 1 - 1 / 4)):
        assert float(DICE(x, t)[0]) == pytest.approx(value, abs=1e-6)
    nothing = jnp.zeros((1, 3, 1))
    assert float(DICE(nothing - 100, nothing)[0]) == pytest.approx(0, abs=1e-6)


def test_pixels_of_a_small_region_are_blamed_more():
    t = jnp.zeros((2, 8, 1)).at[0, :1].set(1).at[1, :6].set(1)
    dx = jax.grad(lambda x: DICE(x, t)[0])(jnp.zeros((2, 8, 1)))
    assert dx[0, 0, 0] < dx[1, 0, 0] < 0 < dx[0, 7, 0]


def test_channels_and_examples_have_weights_of_their_own(x64):
    x, t = normal(0, 2, 5, 3), labels(1, 2, 2, 5, 3)
    w = jnp.asarray([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])
    each = [
        [float(DICE(x[i : i + 1, :, j : j + 1], t[i : i + 1, :, j : j + 1])[0]) for j in range(3)]
        for i in range(2)
    ]
    total, weight = DICE(x, t, w)
    assert float(total) == pytest.approx(float(np.sum(np.asarray(each) * np.asarray(w))))
    assert float(weight) == 3.5
    sick = x.at[:, 2, 1].set(jnp.nan)
    assert_close(
        jax.grad(lambda x: DICE(x, t, w)[0])(sick), jax.grad(lambda x: DICE(x, t, w)[0])(x)
    )


def test_what_does_not_fit_is_refused(unchecked):
    shape = jax.ShapeDtypeStruct
    with pytest.raises(ValueError, match=r"\(B, pixels..., C\), got \(3, 4\); add a channel"):
        jax.eval_shape(DICE, shape((3, 4), "float32"), shape((3, 4), "int32"))
    x, t = shape((3, 4, 1), "float32"), shape((3, 4, 1), "int32")
    with pytest.raises(ValueError, match="smooth above 0, got 0"):
        jax.eval_shape(DICE.bind(smooth=0.0), x, t)
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4, 1\) and \(3, 5, 1\)"):
        jax.eval_shape(DICE, x, shape((3, 5, 1), "int32"))
    with pytest.raises(ValueError, match="dice needs weights whose shape begins"):
        jax.eval_shape(DICE, x, t, shape((3, 4), "float32"))


def test_what_is_nearly_certain_keeps_its_digits():
    x = jnp.linspace(-12, 12, 97).reshape(1, 97, 1)
    t = np.asarray(x > 0)
    own = jax.grad(lambda x: DICE(x, t)[0])(x)
    with jax.enable_x64(True):
        exact = jax.grad(lambda x: DICE(x, t)[0])(jnp.asarray(np.asarray(x, float)))
    np.testing.assert_allclose(own, np.asarray(exact), rtol=3e-6)
