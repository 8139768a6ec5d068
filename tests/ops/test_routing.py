"""Routing: every choice has one place or none, in order, and both tables say the same."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from backhand.ops.routing import capacity_of, seated


def by_hand(chosen, mask, experts, capacity):
    """Seats one after the other: first choices by position, then second ones."""
    batch, tokens, top_k = chosen.shape
    places = np.full(chosen.shape, experts * capacity)
    choices = np.full((batch, experts * capacity), tokens * top_k)
    counts = np.zeros((batch, experts), int)
    for b in range(batch):
        for k in range(top_k):
            for t in range(tokens):
                if mask is not None and not mask[b, t]:
                    continue
                e = chosen[b, t, k]
                if counts[b, e] < capacity:
                    place = e * capacity + counts[b, e]
                    places[b, t, k], choices[b, place] = place, k * tokens + t
                counts[b, e] += 1
    return choices, places, counts


SEATED = jax.jit(seated, static_argnames=("experts", "capacity"))


@settings(max_examples=150)
@given(
    st.sampled_from([(1, 1, 1, 1), (5, 3, 2, 2), (6, 4, 4, 3), (7, 2, 1, 7), (9, 5, 3, 1)]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_choices_are_seated_in_order_until_an_expert_is_full(sizes, masked, seed):
    tokens, experts, top_k, capacity = sizes
    rng = np.random.default_rng(seed)
    chosen = rng.permuted(np.tile(np.arange(experts), (2, tokens, 1)), axis=-1)[..., :top_k]
    mask = rng.random((2, tokens)) < 0.6 if masked else None
    seats = SEATED(jnp.asarray(chosen, jnp.int32), mask, experts=experts, capacity=capacity)
    choices, places, counts = by_hand(chosen, mask, experts, capacity)
    np.testing.assert_array_equal(seats.choices, choices)
    np.testing.assert_array_equal(seats.places, places)
    np.testing.assert_array_equal(seats.counts, counts)


def test_rows_go_to_their_places_and_back():
    chosen = jnp.array([[[0], [0], [1], [0]]])
    seats = seated(chosen, None, experts=2, capacity=2)
    x = jnp.arange(1.0, 5.0)[None, :, None]
    rows = seats.of_tokens(x)
    assert rows[..., 0].tolist() == [[[1.0, 2.0]], [[3.0, 0.0]]]
    assert seats.of_places(rows)[0, :, 0, 0].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert seats.of_choices(x).tolist() == rows[..., 0].tolist()


def test_capacity_is_the_even_share_times_the_factor():
    assert capacity_of(64, 8, 2, 1.0) == 16
    assert capacity_of(64, 8, 2, 1.25) == 20
    assert capacity_of(5, 8, 1, 0.5) == 1
    assert capacity_of(64, 8, 2, 100.0) == capacity_of(64, 8, 2, None) == 64
