"""Rotary positions: each pair of features turned by an angle that grows with the position.

Pair j of a token at position t is turned by the angle a = t base^(-2 j / D):

    y1 = x1 cos a - x2 sin a        dx1 =  dy1 cos a + dy2 sin a
    y2 = x2 cos a + x1 sin a        dx2 =  dy2 cos a - dy1 sin a

The way back is the turn by -a. A turn keeps lengths, and the product of a query turned by a and a
key turned by b depends on a - b alone: attention then sees how far apart two tokens are, not where.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from backhand.arrays import accumulation_dtype, like_primal, need_integers, number
from backhand.protocol import Op, need_floating

X = Float[Array, "B T H D"]
Positions = Integer[Array, "B T"]


def rotary_forward(
    x: X, positions: Positions | None = None, *, base: float = 10000.0, interleaved: bool = False
) -> tuple[X, tuple[X, Positions | None]]:
    """Each pair of features turned by its angle.

    Args:
        x: queries or keys (B, T, H, D), D even.
        positions: integers (B, T); by default 0, 1, ..., T - 1.
        base: the wavelengths grow from 2 pi to 2 pi base.
        interleaved: whether pair j is features 2 j and 2 j + 1, as in the paper; by default it is
            features j and j + D / 2, as in GPT-NeoX and Llama.

    Returns:
        y (B, T, H, D), in the dtype of x; angles are of at least float32.

    Raises:
        TypeError: if x is not floating point, positions are not integers or base is no number.
        ValueError: for an odd D, positions of another shape than (B, T), or a base not above 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> y = bh.ops.rotary(jnp.ones((1, 2, 1, 2)))
        >>> y[0, 0, 0].tolist(), bool(jnp.allclose(y[0, 1, 0, 0], jnp.cos(1.0) - jnp.sin(1.0)))
        ([1.0, 1.0], True)

    References:
        Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """
    _check(x, positions)
    check_base("rotary", base)
    return _turn(x, positions, 1.0, base, interleaved), (x, positions)


def check_base(name: str, base: float) -> None:
    """Refuses what is no base of positions.

    Raises:
        TypeError: if it is no number; True is none.
        ValueError: if it is not above 0.
    """
    if not number(f"{name}'s base of positions, 10000.0 as a rule,", base) > 0:
        raise ValueError(f"{name} needs a base of positions above 0, 10000.0 as a rule, got {base}")


def rotary_backward(
    residuals: tuple[X, Positions | None],
    dy: X,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
) -> tuple[X, None]:
    x, positions = residuals
    return like_primal(_turn(dy, positions, -1.0, base, interleaved), x), None


def _turn(
    x: Array, positions: Array | None, direction: float, base: float, interleaved: bool
) -> Array:
    wide = x.astype(accumulation_dtype(x.dtype))
    half = x.shape[-1] // 2
    if interleaved:
        one, two = wide[..., ::2], wide[..., 1::2]
    else:
        one, two = wide[..., :half], wide[..., half:]
    rates = np.asarray(base ** (-np.arange(half) / half), wide.dtype)
    if positions is None:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    angle = positions.astype(wide.dtype)[:, :, None, None] * rates[None, None, None]
    cos, sin = jnp.cos(angle), direction * jnp.sin(angle)
    turned = one * cos - two * sin, two * cos + one * sin
    if interleaved:
        return jnp.stack(turned, -1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(turned, -1).astype(x.dtype)


def rotary_reference(
    x: Array,
    positions: Array | None = None,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Array:
    """Pairs as complex numbers, times exp(i a)."""
    wide = x.astype(accumulation_dtype(x.dtype))
    batch, tokens, heads, features = x.shape
    order = (features // 2, 2) if interleaved else (2, features // 2)
    pairs = jnp.moveaxis(wide.reshape(batch, tokens, heads, *order), 4 if interleaved else 3, 0)
    where = jnp.arange(tokens)[None] if positions is None else positions
    rates = base ** (-2 * jnp.arange(features // 2, dtype=wide.dtype) / features)
    angle = jnp.einsum("bt,d->btd", where.astype(wide.dtype), rates)[:, :, None]
    turned = lax.complex(pairs[0], pairs[1]) * lax.complex(jnp.cos(angle), jnp.sin(angle))
    parts = jnp.stack([turned.real, turned.imag], 4 if interleaved else 3)
    return parts.reshape(x.shape).astype(x.dtype)


def _check(x: Array, positions: Array | None) -> None:
    need_floating("rotary", x)
    if x.ndim != 4:
        raise ValueError(f"rotary needs x of shape (B, T, H, D), got {x.shape}")
    if x.shape[-1] % 2:
        raise ValueError(f"rotary needs an even head size, to turn pairs, got {x.shape[-1]}")
    if positions is None:
        return
    need_integers("rotary", "positions", positions)
    if positions.shape != x.shape[:2]:
        raise ValueError(
            f"rotary needs positions of shape (B, T) = {x.shape[:2]}, got {positions.shape}"
        )


rotary = Op("rotary", rotary_forward, rotary_backward, rotary_reference)
