"""How long the sequences of a batch are: integers (B,), from 0 to the T steps that there are."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from backhand.arrays import need_integers
from backhand.bounds import need_within


def present(lengths: Array, steps: int) -> Array:
    """Whether a step is within its sequence: (B, T)."""
    return jnp.arange(steps, dtype=jnp.int32)[None] < lengths.astype(jnp.int32)[:, None]


def check_lengths(name: str, lengths: Any, batch: int, steps: int, what: str) -> None:
    """Refuses lengths that are not one integer per example, or outside [0, T].

    Args:
        name: of the op.
        lengths: of the sequences.
        batch: B.
        steps: T.
        what: they are steps of, for the errors.

    Raises:
        TypeError: if they are not an array of integers.
        ValueError: for their shape or values.
    """
    check_integers(name, "lengths", lengths, (batch,), "B,", "; of a mask that is mask.sum(1)")
    need_within(f"{name} needs lengths", lengths, 0, steps, what)


def check_integers(
    name: str, what: str, x: Any, shape: tuple[int, ...], axes: str, advice: str = ""
) -> None:
    """Refuses what is not an array of integers of this shape.

    Raises:
        TypeError: if it is no array, or not of integers.
        ValueError: for its shape.
    """
    need_integers(name, what, x, advice)
    if x.shape != shape:
        raise ValueError(f"{name} needs {what} of shape ({axes}) = {shape}, got {x.shape}")
