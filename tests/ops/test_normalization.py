"""Normalization: what it makes equal, and that its blame is orthogonal to what it removes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal

OPS = {
    "layer_norm": (bh.ops.layer_norm, (-1,)),
    "batch_norm": (bh.ops.batch_norm, (0, 1)),
    "instance_norm": (bh.ops.instance_norm, (1,)),
    "group_norm": (bh.ops.group_norm.bind(groups=1), (1, 2)),
}


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
    dx, dscale, doffset = op.backward(residuals, normal(1, 4, 3, 6), eps=0.0)[:3]
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
    y, residuals = op.forward(jnp.full((4, 2, 3), 7.0), jnp.ones(3), jnp.zeros(3))
    dx = op.backward(residuals, normal(0, 4, 2, 3))[0]
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
        with pytest.raises(ValueError, match=r"one axis of positions, got \(2, 3\); .* layer_norm"):
            jax.eval_shape(bh.ops.instance_norm, shape((2, 3), "float32"), own, own)


def test_groups_are_normalized_each_alone(x64):
    x, scale, offset = normal(0, 3, 5, 6), normal(1, 6), normal(2, 6)
    y = bh.ops.group_norm(x, scale, offset, groups=3)
    for own in (slice(0, 2), slice(2, 4), slice(4, 6)):
        alone = bh.ops.group_norm(x[..., own], scale[own], offset[own], groups=1)
        assert_close(y[..., own], alone)


KINDS = ["layer", "batch", "masked batch", "instance", "group"]


@settings(max_examples=200)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([(2, 6), (3, 2, 6), (1, 2, 2, 4), (4, 3, 1)]),
    st.sampled_from([1, 2, 6]),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.integers(0, 1000),
)
def test_any_groups_and_mask_have_the_gradient_of_the_textbook_form(
    kind, shape, groups, share, seed
):
    random = np.random.default_rng(seed)
    shape = (2, 3, 6) if kind == "instance" and len(shape) < 3 else shape  # it needs positions
    arrays = [random.standard_normal(own) for own in (shape, shape[-1:], shape[-1:])]
    how = {"groups": groups if shape[-1] % groups == 0 else 1} if kind == "group" else {}
    if kind == "masked batch":
        arrays.append(random.random(shape[:-1]) < share)
    # Over a group of one element or two the error of x is zero but for rounding, times 1 / eps.
    op = getattr(bh.ops, f"{kind.split()[-1]}_norm")
    assert_is_its_reference(op, tuple(arrays), seed, floor=1e-11, **how)


def test_padding_has_no_part_in_the_statistics(x64):
    x, own = normal(0, 4, 3, 6), (normal(1, 6), normal(2, 6))
    mask = jnp.arange(3)[None] < jnp.array([3, 1, 0, 2])[:, None]
    y = bh.ops.batch_norm(jnp.where(mask[..., None], x, 1e6), *own, mask)
    alone = bh.ops.batch_norm(x[mask], *own)
    assert_close(y[mask], alone)
    (dx,) = jax.vjp(lambda x: bh.ops.batch_norm(x, *own, mask)[mask], x)[1](jnp.cos(alone))
    assert_close(
        dx[mask], jax.vjp(lambda x: bh.ops.batch_norm(x, *own), x[mask])[1](jnp.cos(alone))[0]
    )
    assert not dx[~mask].any()


@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf])
def test_padding_that_is_no_number_reaches_no_gradient(x64, padding):
    x, own = normal(0, 4, 3, 2), (normal(1, 2), normal(2, 2))
    mask = jnp.arange(3)[None] < jnp.array([3, 1, 0, 2])[:, None]
    dy = jnp.where(mask[..., None], normal(3, 4, 3, 2), 0)

    def back(fill):
        given = jnp.where(mask[..., None], x, fill)
        _, residuals = bh.ops.batch_norm.forward(given, *own, mask)
        return bh.ops.batch_norm.backward(residuals, dy)[:3]

    assert_close(back(padding), back(0.0))


def test_groups_and_masks_that_do_not_fit_are_refused(unchecked, nothing_compiles):
    x, own = jax.ShapeDtypeStruct((4, 3, 6), "float32"), jax.ShapeDtypeStruct((6,), "float32")
    with nothing_compiles():
        for groups, error, message in (
            (4, ValueError, "divides the 6 features .*groups=4"),
            (0, ValueError, "at least 1, got 0"),
            (-2, ValueError, "at least 1, got -2"),
            (2.0, TypeError, r"groups of integers, got 2\.0"),
        ):
            with pytest.raises(error, match=f"group_norm needs .*{message}"):
                jax.eval_shape(bh.ops.group_norm.bind(groups=groups), x, own, own)
        for wrong, error, message in (
            (jax.ShapeDtypeStruct((4,), "bool"), ValueError, r"mask of the shape .*got \(4,\)"),
            (jax.ShapeDtypeStruct((4, 3), "int32"), TypeError, "a boolean mask, got int32"),
            ([True] * 4, TypeError, "a mask as an array of booleans, got a list of 4"),
        ):
            with pytest.raises(error, match=f"batch_norm needs {message}|{message}"):
                jax.eval_shape(bh.ops.batch_norm, x, own, own, wrong)
