"""Routing: which expert works on which token, as integers.

Every expert has C places in each example. Choices are seated in order: the first choices of all
tokens by position, then the second ones, and so on; who finds an expert full is dropped. Two tables
of the same seating turn every move of rows into a gather, forward and in reverse, where autodiff
would add into rows one by one:

    choices (B, E C)     which choice sits in a place       token to place
    places (B, T, K)     in which place a choice sits       place to token

An index out of range, E C or K T, stands for nothing; its row is zero.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


class Seating(NamedTuple):
    """Who sits where; the choice k of token t is number k T + t."""

    choices: Integer[Array, "B P"]
    places: Integer[Array, "B T K"]
    counts: Integer[Array, "B E"]

    def of_tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "E B C D"]:
        """The rows of the tokens that sit in each place."""
        tokens, choices = x.shape[1], self.places.shape[1] * self.places.shape[2]
        token = jnp.where(self.choices < choices, self.choices % max(tokens, 1), tokens)
        return self._by_expert(_rows(x, token))

    def of_choices(self, w: Float[Array, "B T K"]) -> Float[Array, "E B C"]:
        """A number of each choice, at its place."""
        flat = jnp.swapaxes(w, 1, 2).reshape(w.shape[0], w.shape[1] * w.shape[2])
        return self._by_expert(_rows(flat, self.choices))

    def of_places(self, x: Float[Array, "E B C *D"]) -> Float[Array, "B T K *D"]:
        """The rows of the places that each token's choices sit in."""
        by_example = jnp.moveaxis(x, 0, 1)
        flat = by_example.reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])
        return _rows(flat, self.places)

    def _by_expert(self, rows: Array) -> Array:
        """(B, E C, ...) as (E, B, C, ...)."""
        experts = self.counts.shape[1]
        shape = (rows.shape[0], experts, rows.shape[1] // experts, *rows.shape[2:])
        return jnp.moveaxis(rows.reshape(shape), 1, 0)


def seated(
    chosen: Integer[Array, "B T K"],
    mask: Bool[Array, "B T"] | None,
    *,
    experts: int,
    capacity: int,
) -> Seating:
    """Seats the choices of each example on its own.

    Args:
        chosen: the experts that each token chose, best first.
        mask: which tokens there are; others are not seated.
        experts: E.
        capacity: C, places of an expert in each example.

    Example:
        >>> chosen = jnp.array([[[0], [0], [1], [0]]])
        >>> seats = seated(chosen, None, experts=2, capacity=2)
        >>> seats.places[0, :, 0].tolist(), seats.choices[0].tolist(), seats.counts[0].tolist()
        ([0, 1, 2, 4], [0, 1, 2, 4], [3, 1])
    """
    tokens, top_k = chosen.shape[1:]
    count, places = tokens * top_k, experts * capacity
    if mask is not None:
        chosen = jnp.where(mask[..., None], chosen, experts)

    def example(chosen: Array) -> Seating:
        number = jnp.arange(count, dtype=jnp.int32)
        expert = chosen.T.reshape(count).astype(jnp.int32)
        # One sort of distinct numbers: by expert, then by choice.
        order = jnp.sort(expert * count + number) % max(count, 1)
        ids = jnp.arange(experts, dtype=jnp.int32)
        counts = jnp.sum(expert[:, None] == ids[None], 0, dtype=jnp.int32)
        start = jnp.cumsum(counts) - counts
        sorted_place = jnp.zeros(count, jnp.int32).at[order].set(number, unique_indices=True)
        rank = sorted_place - _take(start, expert)
        kept = (rank < capacity) & (expert < experts)
        place = jnp.where(kept, expert * capacity + rank, places)
        within = jnp.arange(capacity, dtype=jnp.int32)[None]
        filled = within < counts[:, None]
        choice = jnp.where(filled, _take(order, start[:, None] + within), count)
        return Seating(choice.reshape(places), place.reshape(top_k, tokens).T, counts)

    return jax.vmap(example)(chosen)


def capacity_of(tokens: int, experts: int, top_k: int, factor: float | None) -> int:
    """The places of an expert in an example: its even share of the choices times the factor.

    At least one, and no more than there are tokens, which is what None gives: nothing is dropped.
    """
    if factor is None:
        return tokens
    return min(tokens, max(1, math.ceil(factor * top_k * tokens / experts)))


def _take(x: Array, at: Array) -> Array:
    """The rows of x at `at`, zero where there is none."""
    return x.at[at].get(mode="fill", fill_value=0)


_rows = jax.vmap(_take)
