"""Global and adaptive pooling: which positions count, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backhand as bh
from backhand.ops.global_pooling import averages
from tests.support import assert_close, normal


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 4, 3), (2, 2, 3, 2, 3)])
def test_global_means_and_maxima_are_those_over_all_positions(shape, x64):
    x, axes = normal(0, *shape), tuple(range(1, len(shape) - 1))
    assert_close(bh.ops.global_average_pool(x), x.mean(axes))
    assert_close(bh.ops.global_max_pool(x), x.max(axes))


def test_the_first_of_equal_positions_gets_all_the_error():
    x = jnp.array([1.0, 5.0, 5.0, 0.0]).reshape(1, 2, 2, 1)
    blame = jax.grad(lambda x: bh.ops.global_max_pool(x).sum())(x)
    assert blame.ravel().tolist() == [0, 1, 0, 0]
    y, back = jax.vjp(bh.ops.global_max_pool, x.at[0, 1, 1].set(jnp.nan))
    assert np.isnan(y).all() and back(jnp.ones_like(y))[0].ravel().tolist() == [0, 0, 0, 1]


@given(st.integers(1, 40), st.integers(1, 40))
def test_parts_cover_every_length_evenly(length, parts):
    """Each row averages: its part begins and ends at most an element away from an exact share."""
    parts = min(parts, length)
    a = averages(parts, length)
    assert a.shape == (parts, length) and (a.sum(0) > 0).all()
    np.testing.assert_allclose(a.sum(1), 1, rtol=1e-12)
    for i, row in enumerate(a):
        (inside,) = np.nonzero(row)
        assert (row[inside] == row[inside[0]]).all() and (np.diff(inside) == 1).all()
        assert 0 <= i * length / parts - inside[0] < 1
        assert 0 <= inside[-1] + 1 - (i + 1) * length / parts < 1


@pytest.mark.parametrize(("length", "parts"), [(7, 3), (9, 7), (12, 4), (5, 1)])
def test_a_part_shares_its_error(length, parts, x64):
    x = normal(0, 2, length, 3)
    y, back = jax.vjp(lambda x: bh.ops.adaptive_average_pool(x, sizes=(parts,)), x)
    a = averages(parts, length)
    assert_close(y, jnp.einsum("sl,blc->bsc", a, x))
    assert_close(back(y)[0], jnp.einsum("sl,bsc->blc", a, y))


def test_what_does_not_fit_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    with nothing_compiles():
        for name in ("global_average_pool", "global_max_pool"):
            for wrong in ((2, 3), (2, 0, 3)):
                with pytest.raises(ValueError, match=rf"{name} needs x of shape .*got \(2, "):
                    jax.eval_shape(getattr(bh.ops, name), shape(wrong, "float32"))
            with pytest.raises(TypeError, match=f"{name} needs floating-point input"):
                jax.eval_shape(getattr(bh.ops, name), shape((2, 3, 4), "int32"))
        for sizes, message in (
            ((9, 2), r"one size from 1 to the length .*\(1, 8, 8, 1\)"),
            ((0, 2), r"sizes of at least 1, got \(0, 2\)"),
            ((2,), r"sizes as one integer or 2, .* got \(2,\)"),
            ((2, 2, 2), r"sizes as one integer or 2, .* got \(2, 2, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(
                    lambda x, sizes=sizes: bh.ops.adaptive_average_pool(x, sizes=sizes),
                    shape((1, 8, 8, 1), "float32"),
                )


def test_a_small_adaptive_pool_keeps_its_axes_apart(x64):
    x, op = normal(0, 2, 5, 7, 3), bh.ops.adaptive_average_pool.bind(sizes=(2, 3))
    (y, ours), (truth, theirs) = jax.vjp(op, x), jax.vjp(op.reference, x)
    assert_close((y, ours(jnp.cos(y))), (truth, theirs(jnp.cos(truth))))
