"""Sinusoidal positions: a constant added to every token, no two of them the same.

table[t, j]         = sin(t base^(-2 j / D))
table[t, D / 2 + j] = cos(t base^(-2 j / D))        y = x + table        dx = dy
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from backhand.protocol import Op, need_floating

X = Float[Array, "B T D"]


def sinusoidal_forward(x: X, *, base: float = 10000.0) -> tuple[X, tuple[()]]:
    """x plus sines and cosines of its positions 0, 1, ..., T - 1.

    Args:
        x: (B, T, D), D even.
        base: the wavelengths grow from 2 pi to 2 pi base.

    Returns:
        y (B, T, D), in the dtype of x.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is not of rank 3, or D is odd.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.sinusoidal(jnp.zeros((1, 1, 4)))[0, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]

    References:
        Vaswani et al., "Attention is all you need", 2017.
    """
    need_floating("sinusoidal", x)
    if x.ndim != 3 or x.shape[-1] % 2:
        raise ValueError(f"sinusoidal needs x of shape (B, T, D) with an even D, got {x.shape}")
    table = sinusoidal_table(x.shape[1], x.shape[2], base)
    return x + jnp.asarray(table, x.dtype)[None], ()


def sinusoidal_backward(residuals: tuple[()], dy: X, *, base: float = 10000.0) -> X:
    return dy


def sinusoidal_table(tokens: int, features: int, base: float = 10000.0) -> np.ndarray:
    """The constant (T, D), in float64."""
    half = features // 2
    angle = np.arange(tokens)[:, None] * base ** (-np.arange(half) / half)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def sinusoidal_reference(x: Array, *, base: float = 10000.0) -> Array:
    _, tokens, features = x.shape
    rows = [
        [np.sin(t / base ** (2 * j / features)) for j in range(features // 2)]
        + [np.cos(t / base ** (2 * j / features)) for j in range(features // 2)]
        for t in range(tokens)
    ]
    return x + jnp.asarray(np.asarray(rows), x.dtype).reshape(1, tokens, features)


sinusoidal = Op("sinusoidal", sinusoidal_forward, sinusoidal_backward, sinusoidal_reference)
