"""Pooling layers, without parameters: (B, *spatial, C), channels last."""

from jax import Array

from backhand import ops
from backhand.ops.global_pooling import check_mask
from backhand.ops.lengths import check_lengths, present
from backhand.ops.settings import Padding, PerAxis
from backhand.protocol import Layer, Op, as_layer, layer
from backhand.visit import Params, Residuals


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

    Uses, where they are given: a `mask` (B, *spatial), true where x is no padding, and of sequences
    `lengths` (B,). What is padding does not count; where all is, y is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(8.0).reshape(1, 8, 1)
        >>> global_average_pool()((), x).tolist()
        [[3.5]]
        >>> global_average_pool()((), x, lengths=jnp.array([4])).tolist()
        [[1.5]]
    """
    return _global(ops.global_average_pool)


def global_max_pool() -> Layer:
    """The maximum over all positions: (B, C).

    Uses, where they are given: a `mask` (B, *spatial), true where x is no padding, and of sequences
    `lengths` (B,). What is padding does not count; where all is, y is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> global_max_pool()((), jnp.arange(8.0).reshape(1, 8, 1)).tolist()
        [[7.0]]
    """
    return _global(ops.global_max_pool)


def _global(op: Op) -> Layer:
    """A layer that pools what is there."""

    def forward(
        params: Params, x: Array, *, mask: Array | None = None, lengths: Array | None = None
    ) -> tuple[Array, Residuals]:
        if lengths is not None:
            mask = _within(op.name, x, mask, lengths)
        return op.forward(x, mask)

    def rule(
        params: Params,
        residuals: Residuals,
        dy: Array,
        *,
        mask: Array | None = None,
        lengths: Array | None = None,
    ) -> tuple[Params, Array]:
        return params, op.cotangents(residuals, dy)[0]

    return layer(op.name, lambda key, x: (), forward, rule)


def _within(name: str, x: Array, mask: Array | None, lengths: Array) -> Array:
    """Which steps of sequences are within their lengths, and in the mask.

    Raises:
        TypeError: if lengths are not integers, or the mask not boolean.
        ValueError: if x is not (B, T, C), or lengths not (B,) and in [0, T]; for a mask of another
            shape.
    """
    if x.ndim != 3:
        raise ValueError(f"{name} takes lengths of sequences (B, T, C), got x of shape {x.shape}")
    if mask is not None:
        check_mask(name, mask, x)
    check_lengths(name, lengths, x.shape[0], x.shape[1], "the steps of x")
    inside = present(lengths, x.shape[1])
    return inside if mask is None else inside & mask


def adaptive_average_pool(sizes: PerAxis) -> Layer:
    """The means of a fixed number of parts along each spatial axis: (B, *sizes, C).

    Example:
        >>> import jax.numpy as jnp
        >>> adaptive_average_pool((2,))((), jnp.arange(8.0).reshape(1, 8, 1)).ravel().tolist()
        [1.5, 5.5]
    """
    return as_layer(ops.adaptive_average_pool, sizes=sizes)
