"""RMS normalization: what it makes equal, and that its blame is orthogonal to its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal, temporary_bytes


@settings(max_examples=200)
@given(
    st.sampled_from([(1, 1), (4, 6), (2, 3, 5), (1, 2, 2, 3), (3, 0, 2)]),
    st.sampled_from([1e-6, 1e-2]),
    st.sampled_from([1e-2, 1.0, 1e3]),
    st.integers(0, 1000),
)
def test_any_shape_and_size_has_the_gradient_of_the_textbook_form(shape, eps, size, seed):
    random = np.random.default_rng(seed)
    x, scale = size * random.standard_normal(shape), random.standard_normal(shape[-1:])
    # Of one feature, y is its sign: the error of x is zero but for eps and rounding.
    assert_is_its_reference(bh.ops.rms_norm, (x, scale), seed, floor=1e-12 / size, eps=eps)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_mean_square_is_one_and_blame_has_no_part_along_the_output(size, x64):
    x, dy = size * normal(0, 4, 3, 6), normal(1, 4, 3, 6)
    y, residuals = bh.ops.rms_norm.forward(x, jnp.ones(6), eps=0.0)
    dx, dscale = bh.ops.rms_norm.backward(residuals, dy, eps=0.0)
    assert_close((y**2).mean(-1), jnp.ones((4, 3)))
    assert jnp.max(jnp.abs(jnp.sum(dx * x, -1))) < 1e-13
    assert_close(dscale, (dy * y).sum((0, 1)))


def test_the_residuals_are_x_and_a_number_a_row():
    x, scale = normal(0, 4, 3, 8), jnp.ones(8)
    residuals = bh.ops.rms_norm.forward(x, scale)[1]
    assert residuals.x is x and residuals.scale is scale and residuals.inverse.shape == (4, 3, 1)


def test_zeros_are_no_division_by_zero(x64):
    y, back = jax.vjp(lambda x: bh.ops.rms_norm(x, jnp.ones(3)), jnp.zeros((2, 3)))
    assert not y.any()
    assert_close(back(jnp.ones_like(y))[0], jnp.full((2, 3), 1e3))


def test_what_cannot_be_normalized_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"rms_norm needs .* scale of .*got \(2, 4\) and \(3"):
            jax.eval_shape(bh.ops.rms_norm, shape((2, 4), "float32"), shape((3,), "float32"))
        with pytest.raises(TypeError, match="rms_norm needs floating-point input, got int32"):
            jax.eval_shape(bh.ops.rms_norm, shape((2, 3), "int32"), shape((3,), "float32"))


def test_what_dscale_sums_is_never_there_beside_dx():
    """XLA would order dx before dscale, and hold an array as large as x for it."""

    def run(x, scale, dy):
        return bh.ops.rms_norm.backward(bh.ops.rms_norm.forward(x, scale)[1], dy)

    x = jnp.ones((128, 64))
    assert temporary_bytes(run, x, jnp.ones(64), x) < x.nbytes / 4
