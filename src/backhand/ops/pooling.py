"""Pooling: windows of (B, *spatial, C), channels last, each brought to one number.

Maximum: y = max_j x_j, and all of the error goes to the element that won, the first of equals:

    dx_j = dy [j = first j with x_j = y]

What is saved is the winner's number in its window, a byte for windows of up to 256 elements, a
sixteenth of float32 inputs under a 2x2 window. An element in several windows adds up what it wins.

Average: y = sum_j x_j / n, so each element gets the same share of the error of every window that it
lies in, whatever its value; nothing is saved:

    dx_j = dy / n
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt

from backhand.arrays import flag, in_pairs, upcast
from backhand.ops.pooling_windows import (
    UNROLLED,
    PoolingWindows,
    over_slots,
    padded,
    pooling_windows,
    spread,
    sums_on_cpu,
)
from backhand.ops.settings import Padding, PerAxis
from backhand.protocol import Op, Static


class Winners(NamedTuple):
    """The number of the slot that won in each window, and the windows."""

    slot: UInt[Array, "B *outputs C"]
    windows: Static


def max_pool_forward(
    x: Float[Array, "B *spatial C"],
    *,
    window: PerAxis,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
) -> tuple[Float[Array, "B *outputs C"], Winners]:
    """The maximum of each window; of equal elements the first gets the error. NaN wins.

    Args:
        x: inputs (B, *spatial, C) with one to three spatial axes.
        window: its size, one for all spatial axes or one for each.
        stride: the step from window to window, one or one for each; as the window by default.
        padding: "VALID", "SAME", or (before, after) for each axis. Padding is -inf: it wins
            over nothing but -inf, and then the error is lost in it, as in JAX.

    Raises:
        TypeError: if x is not floating point, or a size not an integer.
        ValueError: if window, stride or padding does not fit x.

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> x = jnp.array([3.0, 1.0, 2.0, 2.0]).reshape(1, 4, 1)
        >>> bh.ops.max_pool(x, window=(2,)).ravel().tolist()
        [3.0, 2.0]
        >>> jax.grad(lambda x: bh.ops.max_pool(x, window=(2,)).sum())(x).ravel().tolist()
        [1.0, 0.0, 1.0, 0.0]
    """
    windows = pooling_windows("max_pool", x, window, stride, padding)
    dtype = np.min_scalar_type(math.prod(windows.window) - 1)

    def step(number: Any, v: Array, best: tuple[Array, Array] | None) -> tuple[Array, Array]:
        if best is None:
            return v, jnp.zeros(v.shape, dtype)
        y, slot = best
        wins = (v > y) | ((v != v) & (y == y))
        return jnp.where(wins, v, y), jnp.where(wins, jnp.asarray(number, dtype), slot)

    best = over_slots(step, None, padded(x, windows, -math.inf), windows)
    assert best is not None
    y, slot = best
    return y, Winners(slot, Static(windows))


def max_pool_backward(
    residuals: Winners,
    dy: Float[Array, "B *outputs C"],
    *,
    window: PerAxis,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "B *spatial C"]:
    windows: PoolingWindows = residuals.windows.value

    def share(slots: Sequence[Array], slot: Array, dy: Array) -> Array:
        return jnp.where(slot == windows.place(slots).astype(slot.dtype), dy, 0)

    return spread(share, (residuals.slot, dy), windows)


def max_pool_reference(
    x: Array,
    *,
    window: PerAxis,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
) -> Array:
    windows = pooling_windows("max_pool", x, window, stride, padding)
    return lax.reduce_window(x, -jnp.inf, lax.max, *_for_lax(windows))


max_pool = Op("max_pool", max_pool_forward, max_pool_backward, max_pool_reference)


def average_pool_forward(
    x: Float[Array, "B *spatial C"],
    *,
    window: PerAxis,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
    count_padding: bool = False,
) -> tuple[Float[Array, "B *outputs C"], Static]:
    """The mean of each window, in at least float32.

    Args:
        x: inputs (B, *spatial, C) with one to three spatial axes.
        window: its size, one for all spatial axes or one for each.
        stride: the step from window to window, one or one for each; as the window by default.
        padding: "VALID", "SAME", or (before, after) for each axis.
        count_padding: whether padding counts as zeros; else the mean is of what is there.

    Raises:
        TypeError: if x is not floating point, or a size not an integer.
        ValueError: if window, stride or padding does not fit x.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([3.0, 1.0, 2.0]).reshape(1, 3, 1)
        >>> bh.ops.average_pool(x, window=(2,), padding="SAME").ravel().tolist()
        [2.0, 2.0]
        >>> bh.ops.average_pool(x, window=(2,), padding="SAME", count_padding=True).ravel().tolist()
        [2.0, 1.0]
    """
    windows = pooling_windows("average_pool", x, window, stride, padding)
    flag("average_pool's count_padding", count_padding)
    wide, how = upcast(x), _for_lax(windows)
    sums: Any
    if windows.is_padded:
        sums = sums_on_cpu(wide, windows, lambda x: lax.reduce_window(x, 0.0, lax.add, *how))
    elif math.prod(windows.window) <= UNROLLED:
        sums = in_pairs(over_slots(lambda _, v, parts: [*parts, v], [], wide, windows))
    else:
        sums = over_slots(lambda _, v, y: v if y is None else y + v, None, wide, windows)
    return _mean(sums, windows, count_padding).astype(x.dtype), Static(windows)


def average_pool_backward(
    residuals: Static,
    dy: Float[Array, "B *outputs C"],
    *,
    window: PerAxis,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
    count_padding: bool = False,
) -> Float[Array, "B *spatial C"]:
    windows: PoolingWindows = residuals.value
    each = _mean(upcast(dy), windows, count_padding)

    def elsewhere(each: Array) -> Array:
        return spread(lambda slots, each: each, (each,), windows, lean=True)

    if all(s == 1 for s in windows.stride):
        return sums_on_cpu(each, windows.transposed, elsewhere).astype(dy.dtype)
    return elsewhere(each).astype(dy.dtype)


def _mean(sums: Array, windows: PoolingWindows, count_padding: bool) -> Array:
    """The sums of windows over the number of elements in each."""
    if count_padding or not windows.is_padded:
        return sums / math.prod(windows.window)
    counts = []
    for size, k, s, o, (before, _) in zip(
        windows.sizes, windows.window, windows.stride, windows.outputs, windows.padding, strict=True
    ):
        begin = s * np.arange(o) - before
        counts.append(np.minimum(begin + k, size) - np.maximum(begin, 0))
    return sums / jnp.asarray(math.prod(windows.axes(counts)), sums.dtype)


def average_pool_reference(
    x: Array,
    *,
    window: PerAxis,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
    count_padding: bool = False,
) -> Array:
    wide, how = upcast(x), _for_lax(pooling_windows("average_pool", x, window, stride, padding))
    sums = lax.reduce_window(wide, 0.0, lax.add, *how)
    if count_padding:
        return (sums / math.prod(how[0])).astype(x.dtype)
    ones = jnp.ones((1, *x.shape[1:-1], 1), wide.dtype)
    return (sums / lax.reduce_window(ones, 0.0, lax.add, *how)).astype(x.dtype)


average_pool = Op(
    "average_pool", average_pool_forward, average_pool_backward, average_pool_reference
)


def _for_lax(windows: PoolingWindows) -> tuple[Any, Any, Any]:
    """Windows as `lax.reduce_window` takes them."""
    return (1, *windows.window, 1), (1, *windows.stride, 1), ((0, 0), *windows.padding, (0, 0))
