"""How far a computed number may be from the true one: the only tolerances of the suite."""

import jax.numpy as jnp

# What float64 is held to, as a share of the largest number.
EXACT = 1e-12

# The roundings, to the dtype of the result, on the way to it and out of it.
ROUNDINGS = 4


def tolerance(dtype, length=1, magnitude=1.0):
    """The error that a sum may have.

    Its terms are rounded to the dtype of the result, a few times each. They are added up in at
    least float32, where roundings of random sign grow like a random walk: with the root of the
    length.

    Args:
        dtype: of the result and of what it is computed from.
        length: how many terms were summed.
        magnitude: of the largest result.
    """
    own = float(jnp.finfo(dtype).eps)
    summed = min(own, float(jnp.finfo(jnp.float32).eps))
    share = ROUNDINGS * own + max(length, 1) ** 0.5 * summed
    return magnitude * (max(share, EXACT) if dtype == jnp.float64 else share)
