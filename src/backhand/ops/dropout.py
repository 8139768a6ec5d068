"""Dropout: a random share of the inputs is set to zero while training.

    keep ~ Bernoulli(1 - rate)        y = x keep / (1 - rate)        dx = dy keep / (1 - rate)

The mask is not stored: backward makes it again from the key.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from backhand.arrays import explicit_sharding
from backhand.protocol import Op, check_key, need_floating

X = Float[Array, "*shape"]


def dropout_forward(x: X, key: Key[Array, ""], *, rate: float) -> tuple[X, Key[Array, ""]]:
    """Zero with probability `rate`, else x / (1 - rate), so that the mean stays.

    Args:
        x: inputs of any shape.
        key: a key, `jax.random.key(seed)`; the same key drops the same inputs.
        rate: the share that is dropped, in [0, 1), to the nearest multiple of 2^-16.

    Raises:
        TypeError: if x is not floating point, or the key not a typed one.
        ValueError: for a rate outside [0, 1).

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> bh.ops.dropout(jnp.ones(6), jax.random.key(3), rate=0.5).tolist()
        [2.0, 2.0, 2.0, 0.0, 2.0, 0.0]

    References:
        Srivastava et al., "Dropout: a simple way to prevent neural networks from
        overfitting", 2014.
    """
    need_floating("dropout", x)
    check_key(key)
    check_rate(rate)
    return _dropped(x, key, rate), key


def dropout_backward(key: Key[Array, ""], dy: X, *, rate: float) -> tuple[X, None]:
    return _dropped(dy, key, rate), None


def check_rate(rate: float) -> None:
    """Refuses a rate that is not a share below one.

    Raises:
        ValueError: saying so.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout needs a rate in [0, 1), the share that is dropped, got {rate}")


def _dropped(x: Array, key: Array, rate: float) -> Array:
    keep, scale = _keep(key, x, rate)
    return jnp.where(keep, x * scale, jnp.zeros_like(x))


def _keep(key: Array, like: Array, rate: float) -> tuple[Array, float]:
    """What is kept, and what to multiply it by so that the mean stays exactly.

    One random word of 32 bits serves two inputs: 0.55 of the time of `jax.random.bernoulli`. Under
    an explicit mesh each device draws its own part of the mask.
    """
    *lead, last = like.shape or (1,)
    half = -(-last // 2)
    sharding = explicit_sharding(like)
    rows = None if sharding is None else sharding.update(spec=(*sharding.spec[:-1], None))
    words = jax.random.bits(key, (*lead, half), jnp.uint32, out_sharding=rows)
    draws = lax.bitcast_convert_type(words, jnp.uint16).reshape(*lead, 2 * half)[..., :last]
    kept = max(1, round((1 - rate) * 2**16))
    keep = (draws.astype(jnp.uint32) < kept).reshape(like.shape)
    return keep if sharding is None else jax.sharding.reshard(keep, sharding), 2**16 / kept


def dropout_reference(x: Array, key: Array, *, rate: float) -> Array:
    keep, scale = _keep(key, x, rate)
    return x * keep.astype(x.dtype) * scale


dropout = Op("dropout", dropout_forward, dropout_backward, dropout_reference)
