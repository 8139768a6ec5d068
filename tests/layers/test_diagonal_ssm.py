"""The diagonal state-space layer: how it begins, what it remembers, per-example norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_gradient_and_norms, initial, normal


def test_decays_begin_between_nine_tenths_and_almost_one():
    params = bh.diagonal_ssm(5).init(jax.random.key(0), jnp.ones((2, 3, 4)))
    a = jax.nn.sigmoid(params["decay"])
    assert abs(float(a[0]) - 0.9) < 1e-6 and abs(float(a[-1]) - 0.999) < 1e-6
    assert not params["skip"].any()


def test_an_impulse_fades_by_its_decay(x64):
    """One state, all weights one: what came in at the first step is there times a^t."""
    one = jnp.ones((1, 1))
    params = {"w_in": one, "decay": jnp.zeros(1), "w_out": one, "skip": jnp.zeros(1)}
    x = jnp.zeros((1, 5, 1)).at[0, 0].set(1.0)
    y = bh.diagonal_ssm(1)(params, x).ravel()
    assert jnp.abs(y - jnp.sqrt(0.75) * 0.5 ** jnp.arange(5.0)).max() < 1e-12


@pytest.mark.parametrize("decay", [7.0, 17.0])
def test_the_gradient_of_a_decay_of_almost_one_keeps_its_digits(decay):
    layer, x, dy = bh.diagonal_ssm(3), normal(0, 2, 6, 4), normal(1, 2, 6, 4)
    params = {**initial(layer, x), "decay": jnp.full(3, decay)}

    def blame(params, x, dy):
        return jax.grad(lambda p: jnp.vdot(plain(p, x), dy))(params)["decay"]

    def plain(p, x):
        a = jax.nn.sigmoid(p["decay"])
        u = x @ p["w_in"] * jnp.sqrt(jax.nn.sigmoid(-p["decay"]) * (1 + a))[None, None]
        h, y = jnp.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            h = a[None] * h + u[:, t]
            y.append(h @ p["w_out"])
        return jnp.stack(y, 1) + x * p["skip"][None, None]

    _, back = layer.forward(params, x)
    found = layer.backward(params, back, dy)[0]["decay"]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x, dy))
        expected = np.asarray(blame(*wide))
    assert np.abs(found / expected - 1).max() < 1e-5


def test_in_long_sequences_the_root_is_that_of_the_rounded_decay():
    """The first step of an impulse is sqrt(1 - a^2), a in float32 or, in short ones, exact."""
    one, decay = jnp.ones((1, 1)), 7.1
    params = {"w_in": one, "decay": jnp.full(1, decay), "w_out": one, "skip": jnp.zeros(1)}
    roots = [bh.diagonal_ssm(1)(params, jnp.ones((1, steps, 1)))[0, 0, 0] for steps in (3, 4000)]
    exact, rounded = 1 / (1 + np.exp(-np.float64(np.float32(decay)))), jax.nn.sigmoid(decay)
    expected = [np.sqrt(1 - np.float64(a) ** 2) for a in (exact, rounded)]
    assert abs(expected[0] / expected[1] - 1) > 2e-6
    assert np.abs(np.divide(roots, expected) - 1).max() < 3e-7


def test_noise_keeps_its_variance():
    x = normal(0, 1, 4000, 1)
    one = jnp.ones((1, 1))
    for decay in (-2.0, 3.0):
        params = {"w_in": one, "decay": jnp.full(1, decay), "w_out": one, "skip": jnp.zeros(1)}
        assert 0.7 < float(bh.diagonal_ssm(1)(params, x).var()) < 1.4


@pytest.mark.parametrize("reverse", [False, True])
def test_norms_of_examples_come_with_the_gradient(reverse, x64):
    model = bh.chain(bh.skip(bh.chain(bh.diagonal_ssm(4, reverse=reverse), bh.gelu())))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 3, 5, 2), "targets": normal(1, 3, 5, 2)}
    assert_gradient_and_norms(objective, initial(model, batch["inputs"]), batch)


def test_what_does_not_fit_is_refused(unchecked):
    with pytest.raises(ValueError, match="diagonal_ssm needs at least 1 state, got 0"):
        bh.diagonal_ssm(0)
    with pytest.raises(ValueError, match=r"diagonal_ssm needs x of shape .* got \(3, 4\)"):
        bh.diagonal_ssm(2).init(jax.random.key(0), jnp.ones((3, 4)))
