"""Ops that move numbers without changing them: reshape, flatten, cast.

Blame goes back to where the numbers came from: backward undoes the move.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from backhand.arrays import explicit_sharding, reshape_examples
from backhand.protocol import Op, Static, need_floating


def reshape_forward(x: Array, *, shape: tuple[int, ...]) -> tuple[Array, Static]:
    """x (B, *features) as (B, *shape): the batch axis stays.

    Args:
        x: inputs with a batch axis.
        shape: the new shape of one example; one of its sizes may be -1.

    Raises:
        ValueError: if an example has not as many elements.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.reshape(jnp.zeros((2, 28, 28)), shape=(28, 28, 1)).shape
        (2, 28, 28, 1)
    """
    if x.ndim == 0:
        raise ValueError("reshape needs x with a batch axis, got a scalar")
    size, known = math.prod(x.shape[1:]), math.prod(s for s in shape if s != -1)
    free = shape.count(-1)
    if free > 1 or (size != known if free == 0 else known == 0 or size % known):
        raise ValueError(f"reshape needs examples of {shape}, got {x.shape[1:]}: {size} elements")
    full = tuple(size // known if s == -1 else s for s in shape)
    return reshape_examples(x, full), Static((x.shape, explicit_sharding(x)))


def reshape_backward(residuals: Static, dy: Array, *, shape: tuple[int, ...]) -> Array:
    shape, sharding = residuals.value
    return lax.reshape(dy, shape, out_sharding=sharding)


def reshape_reference(x: Array, *, shape: tuple[int, ...]) -> Array:
    return jnp.reshape(
        x, (x.shape[0], *shape) if x.size else reshape_forward(x, shape=shape)[0].shape
    )


reshape = Op("reshape", reshape_forward, reshape_backward, reshape_reference)


def flatten_forward(x: Array) -> tuple[Array, Static]:
    """x (B, ...) as (B, D): every example one vector.

    Raises:
        ValueError: if x has no batch axis.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.flatten(jnp.zeros((2, 8, 8))).shape
        (2, 64)
    """
    if x.ndim == 0:
        raise ValueError("flatten needs x with a batch axis, got a scalar")
    return reshape_examples(x, (math.prod(x.shape[1:]),)), Static((x.shape, explicit_sharding(x)))


def flatten_backward(residuals: Static, dy: Array) -> Array:
    shape, sharding = residuals.value
    return lax.reshape(dy, shape, out_sharding=sharding)


def flatten_reference(x: Array) -> Array:
    return jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:])))


flatten = Op("flatten", flatten_forward, flatten_backward, flatten_reference)


def cast_forward(
    x: Float[Array, "*shape"], *, dtype: DTypeLike
) -> tuple[Float[Array, "*shape"], Static]:
    """x in another floating-point dtype; its error comes back in the dtype of x.

    Raises:
        TypeError: if x or `dtype` is not floating point.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.cast(jnp.ones(2), dtype=jnp.bfloat16).dtype
        dtype(bfloat16)
    """
    need_floating("cast", x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"cast needs a floating-point dtype, got {jnp.dtype(dtype)}")
    return x.astype(dtype), Static(x.dtype)


def cast_backward(residuals: Static, dy: Array, *, dtype: DTypeLike) -> Array:
    return dy.astype(residuals.value)


def cast_reference(x: Array, *, dtype: DTypeLike) -> Array:
    return x.astype(dtype)


cast = Op("cast", cast_forward, cast_backward, cast_reference)
