"""How far a computed number may be from the true one: the only tolerances of the suite."""

import jax.numpy as jnp
from jax.typing import DTypeLike

# What float64 is held to, as a share of the largest summed term.
EXACT = 1e-12

# The roundings on the way to a term: a handful of products, a quotient, an exponential.
ROUNDINGS = 8


def tolerance(dtype: DTypeLike, length: int = 1, magnitude: float = 1.0) -> float:
    """The error that a sum may have.

    Roundings of random sign add up like a random walk, so they grow with the root of the length.

    Args:
        dtype: in which it was computed.
        length: how many terms were summed.
        magnitude: of the largest of them.
    """
    share = ROUNDINGS * float(jnp.finfo(dtype).eps) * max(length, 1) ** 0.5
    return (max(share, EXACT) if dtype == jnp.float64 else share) * magnitude
