"""Squared, absolute and Huber's error: values, kinks, outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, normal

ALL = {
    "squared": bh.losses.mean_squared_error,
    "absolute": bh.losses.mean_absolute_error,
    "huber": bh.losses.huber.bind(delta=2.0),
}


def slope(loss, error):
    """The blame of one prediction that is off by `error`."""
    return float(jax.grad(lambda p: loss(p, jnp.zeros(1))[0])(jnp.asarray([error]))[0])


@pytest.mark.parametrize(
    ("name", "error", "value", "blame"),
    [
        ("squared", 3.0, 9.0, 6.0),
        ("squared", -1.0, 1.0, -2.0),
        ("absolute", -3.0, 3.0, -1.0),
        ("absolute", 0.0, 0.0, 1.0),
        ("huber", 1.0, 0.5, 1.0),
        ("huber", 2.0, 2.0, 2.0),
        ("huber", -5.0, 8.0, -2.0),
        ("huber", 0.0, 0.0, 0.0),
    ],
)
def test_known_values_and_blames(name, error, value, blame):
    total, weight = ALL[name](jnp.asarray([error]), jnp.zeros(1))
    assert (float(total), float(weight)) == (value, 1)
    assert slope(ALL[name], error) == blame


@pytest.mark.parametrize("error", [-2.0, -0.0, 0.0, 2.0])
def test_kinks_are_as_jax_has_them(error):
    huber = ALL["huber"]
    theirs = jax.grad(lambda p: huber.reference(p, jnp.zeros(1))[0])(jnp.asarray([error]))
    assert slope(huber, error) == float(theirs[0])
    assert slope(ALL["absolute"], error) == float(jax.grad(jnp.abs)(error))


@pytest.mark.parametrize("name", ALL)
def test_targets_get_the_opposite_blame_unless_they_are_integers(x64, name):
    p, t = normal(0, 4), normal(1, 4)
    _, residuals = ALL[name].forward(p, t)
    dy = (jnp.ones(()), jnp.zeros(()))
    dp, dt, dw = ALL[name].backward(residuals, dy)
    assert_close(dt, -dp)
    assert dw is None
    _, residuals = ALL[name].forward(p, jnp.asarray([1, 0, 2, 3]))
    assert ALL[name].backward(residuals, dy)[1] is None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ALL)
def test_low_precision_is_summed_in_float32(name, dtype):
    p, t = jnp.full(4096, 1.5, dtype), jnp.full(4096, 0.5, dtype)
    total, weight = ALL[name](p, t)
    assert (total.dtype, weight.dtype) == (jnp.float32, jnp.float32)
    assert (float(total), float(weight)) == ({"huber": 2048}.get(name, 4096), 4096)
    dp = jax.grad(lambda p: ALL[name](p, t)[0])(p)
    assert (dp.dtype, dp.shape) == (dtype, p.shape)


def test_an_outlier_has_at_most_deltas_blame():
    for error in (1e4, -1e20):
        assert abs(slope(ALL["huber"], error)) == 2
        assert np.isfinite(float(ALL["huber"](jnp.asarray([error]), jnp.zeros(1))[0]))


def test_what_is_no_pair_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    with nothing_compiles():
        for loss in ALL.values():
            with pytest.raises(
                ValueError, match=r"one shape, got \(3, 1\) and \(3,\); add or drop"
            ):
                jax.eval_shape(loss, shape((3, 1), "float32"), shape((3,), "float32"))
            with pytest.raises(TypeError, match="needs floating-point predictions, got int32"):
                jax.eval_shape(loss, shape((3,), "int32"), shape((3,), "float32"))
        with pytest.raises(ValueError, match="huber needs delta above 0, got 0"):
            own = shape((3,), "float32")
            jax.eval_shape(lambda p, t: bh.losses.huber(p, t, delta=0.0), own, own)
