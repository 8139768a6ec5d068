"""Sinusoidal positions: a constant that tells positions apart."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import backhand as bh
from backhand.ops.positions import sinusoidal_table
from tests.conformance.checks import both_sides
from tests.support import assert_close, normal


def test_a_shift_is_the_same_turn_everywhere():
    """What the paper chose them for: the table at t + s is a linear map of that at t."""
    table = sinusoidal_table(50, 8)
    map_, *_ = np.linalg.lstsq(table[:-3], table[3:], rcond=None)
    np.testing.assert_allclose(table[:-3] @ map_, table[3:], atol=1e-10)


def test_no_two_positions_are_the_same():
    table = sinusoidal_table(500, 16)
    apart = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert apart[~np.eye(500, dtype=bool)].min() > 0.1


def test_the_error_passes_as_it_is(x64):
    x, dy = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    y, residuals = bh.ops.sinusoidal.forward(x, base=50.0)
    assert_close(y - x, jnp.broadcast_to(sinusoidal_table(3, 4, 50.0), x.shape))
    assert bh.ops.sinusoidal.backward(residuals, dy, base=50.0) is dy
    assert residuals == ()


COMPILED = {
    base: jax.jit(functools.partial(both_sides, bh.ops.sinusoidal.bind(base=base)))
    for base in (10.0, 10000.0)
}


@given(
    st.sampled_from([(1, 1, 2), (2, 5, 4), (3, 0, 2)]),
    st.sampled_from(sorted(COMPILED)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_any_tokens_are_the_references_and_so_is_their_blame(shape, base, seed):
    with jax.enable_x64(True):
        assert_close(*COMPILED[base]((normal(seed, *shape),), normal(seed + 1, *shape)))


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 4), ()])
def test_what_has_no_positions_is_refused(shape, unchecked):
    with pytest.raises(ValueError, match=r"x of shape \(B, T, D\) with an even D, got"):
        jax.eval_shape(bh.ops.sinusoidal, jax.ShapeDtypeStruct(shape, "float32"))
