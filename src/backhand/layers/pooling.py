"""Pooling layers, without parameters: (B, *spatial, C), channels last."""

from backhand import ops
from backhand.ops.settings import Padding, PerAxis
from backhand.protocol import Layer, as_layer


def max_pool(
    window: PerAxis, *, stride: PerAxis | None = None, padding: Padding = "VALID"
) -> Layer:
    """The maximum of each window; `stride` is the window's size by default.

    Example:
        >>> import jax.numpy as jnp
        >>> max_pool((4,))((), jnp.arange(8.0).reshape(1, 8, 1)).ravel().tolist()
        [3.0, 7.0]
    """
    return as_layer(ops.max_pool, window=window, stride=stride, padding=padding)


def average_pool(
    window: PerAxis,
    *,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
    count_padding: bool = False,
) -> Layer:
    """The mean of each window, of what is there unless padding counts as zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> average_pool((4,))((), jnp.arange(8.0).reshape(1, 8, 1)).ravel().tolist()
        [1.5, 5.5]
    """
    return as_layer(
        ops.average_pool,
        window=window,
        stride=stride,
        padding=padding,
        count_padding=count_padding,
    )


def global_average_pool() -> Layer:
    """The mean over all positions: (B, C).

    Example:
        >>> import jax.numpy as jnp
        >>> global_average_pool()((), jnp.arange(8.0).reshape(1, 8, 1)).tolist()
        [[3.5]]
    """
    return as_layer(ops.global_average_pool)


def global_max_pool() -> Layer:
    """The maximum over all positions: (B, C).

    Example:
        >>> import jax.numpy as jnp
        >>> global_max_pool()((), jnp.arange(8.0).reshape(1, 8, 1)).tolist()
        [[7.0]]
    """
    return as_layer(ops.global_max_pool)


def adaptive_average_pool(sizes: PerAxis) -> Layer:
    """The means of a fixed number of parts along each spatial axis: (B, *sizes, C).

    Example:
        >>> import jax.numpy as jnp
        >>> adaptive_average_pool((2,))((), jnp.arange(8.0).reshape(1, 8, 1)).ravel().tolist()
        [1.5, 5.5]
    """
    return as_layer(ops.adaptive_average_pool, sizes=sizes)
