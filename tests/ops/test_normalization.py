"""Normalization: what it makes equal, and that its blame is orthogonal to what it removes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, normal

OPS = {"layer_norm": (bh.ops.layer_norm, (-1,)), "batch_norm": (bh.ops.batch_norm, (0, 1))}


@pytest.mark.parametrize("name", OPS)
def test_groups_have_mean_zero_and_variance_one(x64, name):
    op, axes = OPS[name]
    y = op(5 + 3 * normal(0, 4, 3, 6), jnp.ones(6), jnp.zeros(6), eps=0.0)
    assert_close(y.mean(axes), jnp.zeros_like(y.mean(axes)), floor=1e-13)
    assert_close(y.var(axes), jnp.ones_like(y.var(axes)))


@pytest.mark.parametrize("name", OPS)
def test_blame_has_no_part_in_the_mean_or_along_the_output(x64, name):
    """Shifting or stretching a group changes nothing, so no error points that way."""
    op, axes = OPS[name]
    x = normal(0, 4, 3, 6)
    y, residuals = op.forward(x, jnp.ones(6), jnp.zeros(6), eps=0.0)
    dx, dscale, doffset = op.backward(residuals, normal(1, 4, 3, 6), eps=0.0)
    for direction in (jnp.ones_like(x), y):
        assert jnp.max(jnp.abs(jnp.sum(dx * direction, axes))) < 1e-13
    assert_close(doffset, normal(1, 4, 3, 6).sum((0, 1)))
    assert_close(dscale, (normal(1, 4, 3, 6) * y).sum((0, 1)))


@pytest.mark.parametrize("name", OPS)
def test_low_precision_is_normalized_in_float32(name):
    """In bfloat16 a mean of 100 and a spread of 1 would leave two digits of the spread."""
    op, _ = OPS[name]
    x = (100 + normal(0, 64, 32, 8)).astype(jnp.bfloat16)
    y = op(x, jnp.ones(8), jnp.zeros(8))
    with jax.enable_x64(True):
        exact = op(jnp.asarray(np.asarray(x, np.float64)), jnp.ones(8), jnp.zeros(8))
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, float) - np.asarray(exact)).max() < 0.02


@pytest.mark.parametrize("name", OPS)
def test_a_constant_group_is_no_division_by_zero(name):
    op, _ = OPS[name]
    y, residuals = op.forward(jnp.full((4, 3), 7.0), jnp.ones(3), jnp.zeros(3))
    dx = op.backward(residuals, normal(0, 4, 3))[0]
    assert not y.any() and np.isfinite(dx).all()


def test_what_cannot_be_normalized_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    own = shape((3,), "float32")
    with nothing_compiles():
        for name, (op, _) in OPS.items():
            with pytest.raises(ValueError, match=rf"{name} needs x of shape .* got \(3,\), \(3,\)"):
                jax.eval_shape(op, own, own, own)
            with pytest.raises(ValueError, match=r"got \(2, 4\), \(3,\) and \(3,\)"):
                jax.eval_shape(op, shape((2, 4), "float32"), own, own)
            with pytest.raises(TypeError, match=f"{name} needs floating-point input, got int32"):
                jax.eval_shape(op, shape((2, 3), "int32"), own, own)
