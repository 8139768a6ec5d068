"""Linear maps: y = x w + b.

    y[n, o] = sum_i x[n, i] w[i, o] + b[o]

Each weight joins one input to one output, so blame flows back through it twice: to the weight, what
came in times the error going out; to the input, the error times the weight.

    dw[i, o] = sum_n x[n, i] dy[n, o]
    db[o]    = sum_n dy[n, o]
    dx[n, i] = sum_o dy[n, o] w[i, o]
"""

from jaxtyping import Array, Float

from backhand.arrays import contract, last_axis, product
from backhand.contributions import Outer, Total, total
from backhand.protocol import Op, need_floating

Residuals = tuple[Float[Array, "... I"], Float[Array, "I O"], Float[Array, " O"] | None]


def linear_forward(
    x: Float[Array, "... I"], w: Float[Array, "I O"], b: Float[Array, " O"] | None = None
) -> tuple[Float[Array, "... O"], Residuals]:
    """y = x w + b, in the dtype of x.

    Args:
        x: inputs (..., I).
        w: weights (I, O), cast to the dtype of x.
        b: bias (O,), or None.

    Returns:
        y (..., O).

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has not I features, or b not O.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.linear(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4)).shape
        (2, 4)
    """
    need_floating("linear", x)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"linear needs x of shape (..., {w.shape[0]}) for weights {w.shape}, got {x.shape}: "
            f"the last axis of x is its features"
        )
    if b is not None and b.shape != w.shape[1:]:
        raise ValueError(f"linear needs a bias of shape {w.shape[1:]}, got {b.shape}")
    y = product(x, w)
    if b is not None:
        y = y + last_axis(b.astype(x.dtype), y)
    return y, (x, w, b)


def linear_backward(
    residuals: Residuals, dy: Float[Array, "... O"]
) -> tuple[Float[Array, "... I"], Float[Array, "I O"], Float[Array, " O"] | None]:
    x, w, b = residuals
    db = None if b is None else total(Total(dy), b)
    dw = total(Outer(x, dy), w)
    return linear_dx(dy, w, x), dw, db


def linear_dx(
    dy: Float[Array, "... O"], w: Float[Array, "I O"], like: Float[Array, "... I"]
) -> Float[Array, "... I"]:
    """The error of the input: dy w^T, in the dtype and sharding of the input."""
    return contract(dy, w.astype(dy.dtype), ((dy.ndim - 1,), (1,)), like)


def linear_reference(x: Array, w: Array, b: Array | None = None) -> Array:
    y = x @ w.astype(x.dtype)
    return y if b is None else y + last_axis(b.astype(x.dtype), y)


linear = Op("linear", linear_forward, linear_backward, linear_reference)
