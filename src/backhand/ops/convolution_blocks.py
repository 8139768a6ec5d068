"""Work on a batch a block of it at a time, so that what it needs on the way stays in the cache."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def block_size(length: int, most: int) -> int:
    """How much of `length` to take at a time, at most `most`: a divisor if one is near."""
    most = max(1, min(length, most))
    divisor = next((n for n in range(most, most // 2, -1) if length % n == 0), None)
    return divisor or most


def each_block(
    step: Callable[[Any, Array | int, int], Any], carry: Any, length: int, most: int
) -> Any:
    """`carry` after `step(carry, start, count)` over `length`, at most `most` at a time."""
    if length == 0:
        return carry
    size = block_size(length, most)
    whole, rest = divmod(length, size)
    if whole == 1:
        carry = step(carry, 0, size)
    else:
        carry = lax.fori_loop(0, whole, lambda i, carry: step(carry, i * size, size), carry)
    return step(carry, whole * size, rest) if rest else carry


def by_examples(f: Callable[[Array], Array], x: Array, most: int) -> Array:
    """`f(x)` of a function that keeps examples apart, at most `most` of them at a time."""
    if x.shape[0] <= most:
        return f(x)
    size = block_size(x.shape[0], most)
    whole, rest = divmod(x.shape[0], size)
    starts = size * jnp.arange(whole, dtype=jnp.int32)
    y = lax.map(lambda start: f(lax.dynamic_slice_in_dim(x, start, size)), starts)
    y = y.reshape(whole * size, *y.shape[2:])
    return jnp.concatenate([y, f(x[whole * size :])]) if rest else y
