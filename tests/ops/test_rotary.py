"""Rotary positions: turns that keep lengths, and products that see distances only."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import backhand as bh
from tests.conformance.checks import both_sides
from tests.support import assert_close, labels, normal

rotary = bh.ops.rotary


COMPILED = {
    interleaved: jax.jit(
        functools.partial(both_sides, rotary.bind(interleaved=interleaved, base=base))
    )
    for interleaved, base in ((False, 10000.0), (True, 50.0))
}


@given(
    st.sampled_from([(1, 1, 1, 2), (2, 3, 2, 4)]),
    st.booleans(),
    st.none() | st.lists(st.integers(0, 1000), min_size=6, max_size=6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_any_positions_give_the_references_turns_and_blame(shape, interleaved, drawn, seed):
    with jax.enable_x64(True):
        x, dy = normal(seed, *shape), normal(seed + 1, *shape)
        positions = drawn and jnp.asarray(drawn[: shape[0] * shape[1]]).reshape(shape[:2])
        assert_close(*COMPILED[interleaved]((x, positions), dy))


@pytest.mark.parametrize("interleaved", [False, True])
def test_lengths_are_kept(interleaved, x64):
    x = normal(0, 2, 7, 3, 6)
    y = rotary(x, labels(1, 1000, 2, 7), interleaved=interleaved)
    assert_close(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1))
    assert not jnp.allclose(y, x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_relative_positions_only(interleaved, x64):
    q, k = normal(0, 1, 5, 2, 4), normal(1, 1, 5, 2, 4)

    def scores(offset):
        positions = jnp.arange(5)[None] + offset
        turned = (rotary(x, positions, interleaved=interleaved) for x in (q, k))
        return jnp.einsum("bthd,bshd->bhts", *turned)

    assert_close(scores(0), scores(100), 1e-11)
    same = jnp.einsum("bthd,bshd->bhts", q, k)
    assert_close(jnp.diagonal(scores(7), 0, 2, 3), jnp.diagonal(same, 0, 2, 3))
    assert not jnp.allclose(scores(0), same)


def test_positions_begin_at_zero(x64):
    x = normal(0, 2, 3, 2, 4)
    assert_close(rotary(x), rotary(x, jnp.broadcast_to(jnp.arange(3), (2, 3))))
    assert_close(rotary(x)[:, 0], x[:, 0])


def test_the_error_is_turned_back(x64):
    x, positions = normal(0, 2, 3, 2, 4), labels(1, 9, 2, 3)
    y, residuals = rotary.forward(x, positions)
    dx, none = rotary.backward(residuals, y)
    assert none is None
    assert_close(dx, x)


def test_pairs_are_halves_or_neighbours(x64):
    """The same turns, on features in another order."""
    x = normal(0, 1, 4, 1, 6)
    order = jnp.asarray([0, 2, 4, 1, 3, 5])  # of neighbours, so that their halves are pairs
    assert_close(rotary(x[..., order]), rotary(x, interleaved=True)[..., order])


def test_far_positions_are_exact_in_bfloat16():
    """Angles are of float32: in bfloat16 position 1001 would be 1000."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    near, far = (rotary(x, jnp.full((1, 1), t)) for t in (1000, 1001))
    assert near.dtype == jnp.bfloat16 and (near != far).all()


def test_what_cannot_be_turned_is_refused(unchecked):
    x = jnp.ones((2, 3, 2, 4))
    for message, wrong in {
        "an even head size, to turn pairs, got 3": (x[..., :3],),
        r"x of shape \(B, T, H, D\), got \(2, 3, 2\)": (x[..., 0],),
        r"positions of shape \(B, T\) = \(2, 3\), got \(3,\)": (x, jnp.arange(3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(rotary, *wrong)
    with pytest.raises(TypeError, match=r"rotary's base of positions, .* a number, got True"):
        rotary(x, base=True)
    with pytest.raises(ValueError, match=r"base of positions above 0, .* got -1\.0"):
        rotary(x, base=-1.0)
    with pytest.raises(TypeError, match="integer positions, got float32"):
        rotary(x, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="positions as an array of integers, got a list of 2"):
        rotary(x, [[0, 1, 2]] * 2)
    with pytest.raises(TypeError, match="floating-point input, got int32"):
        rotary(x.astype(jnp.int32))
