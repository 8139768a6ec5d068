"""Pooling of whole images, or of a fixed number of parts: (B, *spatial, C), channels last.

Global average: y = sum_p x_p / n over all positions p, so dx_p = dy / n. Nothing is saved.

Global maximum: y = max_p x_p; all of the error goes to the first position that has it. The number
of that position is saved, one for each channel.

Adaptive average: axis by axis y = A x, where row i of the matrix A (S, L) averages the elements
from floor(i L / S) up to ceil((i + 1) L / S), so that S parts cover an axis of any length L >= S
evenly, one overlapping the next by at most an element. Then dx = A^T dy, in the reverse order.
Where S divides L this is average pooling, and is run as that.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from backhand.arrays import explicit_sharding, upcast
from backhand.ops.pooling import average_pool
from backhand.ops.pooling_windows import PoolingWindows
from backhand.ops.settings import PerAxis, per_axis
from backhand.protocol import Op, Static, need_floating

SMALL = 1 << 16
"""Terms of one product over all axes up to which it is taken: 2x9x9x4 to 7x7 took half of the
memory of a product for each axis."""


def global_average_pool_forward(
    x: Float[Array, "B *spatial C"],
) -> tuple[Float[Array, "B C"], Static]:
    """The mean over all spatial axes, in at least float32: (B, C).

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has no spatial axis, or nothing along one.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.global_average_pool(jnp.ones((2, 8, 8, 3))).shape
        (2, 3)
    """
    axes = _spatial("global_average_pool", x)
    mean = jnp.sum(upcast(x), axes) / math.prod(x.shape[1:-1])
    return mean.astype(x.dtype), Static(x.shape[1:-1])


def global_average_pool_backward(
    residuals: Static, dy: Float[Array, "B C"]
) -> Float[Array, "B *spatial C"]:
    sizes = residuals.value
    each = (upcast(dy) / math.prod(sizes)).astype(dy.dtype)
    return _over(each, sizes)


def global_average_pool_reference(x: Array) -> Array:
    return jnp.mean(upcast(x), tuple(range(1, x.ndim - 1))).astype(x.dtype)


global_average_pool = Op(
    "global_average_pool",
    global_average_pool_forward,
    global_average_pool_backward,
    global_average_pool_reference,
)


class First(NamedTuple):
    """The position that won in each channel, counted row by row, and the spatial sizes."""

    position: Int[Array, "B C"]
    sizes: Static


def global_max_pool_forward(
    x: Float[Array, "B *spatial C"],
) -> tuple[Float[Array, "B C"], First]:
    """The maximum over all spatial axes: (B, C). The first of equals gets the error; NaN wins.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has no spatial axis, or nothing along one.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([[1.0, 5.0], [3.0, 2.0]]).reshape(1, 2, 2, 1)
        >>> bh.ops.global_max_pool(x).tolist()
        [[5.0]]
    """
    axes = _spatial("global_max_pool", x)
    sizes = x.shape[1:-1]
    y = jnp.max(x, axes)
    won = (x == _over(y, sizes)) | (x != x)
    # The first is the one with the most positions from it to the end. XLA on CPU reduces floats in
    # half the time of integers; up to 2^24 they are as exact.
    count = math.prod(sizes)
    counted = jnp.float32 if count <= 2**24 else jnp.int32
    to_the_end = jnp.where(won, count - _positions(sizes).astype(counted), 0)
    first = count - jnp.max(to_the_end, axes).astype(jnp.int32)
    return y, First(first, Static(sizes))


def global_max_pool_backward(
    residuals: First, dy: Float[Array, "B C"]
) -> Float[Array, "B *spatial C"]:
    sizes = residuals.sizes.value
    won = _over(residuals.position, sizes) == _positions(sizes)
    return jnp.where(won, _over(dy, sizes), 0)


def global_max_pool_reference(x: Array) -> Array:
    whole = (1, *x.shape[1:-1], 1)
    y = lax.reduce_window(x, -jnp.inf, lax.max, whole, (1,) * x.ndim, "VALID")
    return y.reshape(x.shape[0], x.shape[-1])


global_max_pool = Op(
    "global_max_pool", global_max_pool_forward, global_max_pool_backward, global_max_pool_reference
)


def adaptive_average_pool_forward(
    x: Float[Array, "B *spatial C"], *, sizes: PerAxis
) -> tuple[Float[Array, "B *parts C"], Static]:
    """The means of a fixed number of parts along each spatial axis, in at least float32.

    Args:
        x: inputs (B, *spatial, C) with one to three spatial axes.
        sizes: the number of parts, one for all spatial axes or one for each.

    Raises:
        TypeError: if x is not floating point, or a size not an integer.
        ValueError: if sizes are not one for each spatial axis, or larger than x.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.arange(5.0).reshape(1, 5, 1)
        >>> bh.ops.adaptive_average_pool(x, sizes=(2,)).ravel().tolist()
        [1.0, 3.0]
    """
    _spatial("adaptive_average_pool", x)
    inputs = x.shape[1:-1]
    parts_of = per_axis("adaptive_average_pool", "sizes", sizes, len(inputs))
    if len(inputs) > 3 or any(s > n for s, n in zip(parts_of, inputs, strict=True)):
        raise ValueError(
            "adaptive_average_pool needs one size from 1 to the length of x for each of 1 to 3 "
            f"spatial axes, got sizes {parts_of} for x {x.shape}"
        )
    if own := _even(parts_of, inputs):
        return average_pool.forward(x, window=own)
    matrices = [averages(*axis) for axis in zip(parts_of, inputs, strict=True)]
    return _each_axis(matrices, upcast(x)).astype(x.dtype), Static(inputs)


def adaptive_average_pool_backward(
    residuals: Static, dy: Float[Array, "B *parts C"], *, sizes: PerAxis
) -> Float[Array, "B *spatial C"]:
    inputs = residuals.value
    if isinstance(inputs, PoolingWindows):
        return average_pool.backward(residuals, dy, window=inputs.window)
    axes = zip(dy.shape[1:-1], inputs, strict=True)
    dx = _each_axis([averages(*axis).T for axis in axes], upcast(dy))
    return dx.astype(dy.dtype)


def _even(sizes: Sequence[int], inputs: tuple[int, ...]) -> tuple[int, ...] | None:
    """The window of an average pooling, where the parts are all of one length."""
    if any(length % parts for parts, length in zip(sizes, inputs, strict=True)):
        return None
    return tuple(length // parts for parts, length in zip(sizes, inputs, strict=True))


def averages(parts: int, length: int) -> np.ndarray:
    """A (S, L): row i averages part i."""
    part, place = np.arange(parts)[:, None], np.arange(length)[None]
    begin, end = part * length // parts, -(-(part + 1) * length // parts)
    return np.where((begin <= place) & (place < end), 1 / (end - begin), 0)


def _each_axis(matrices: Sequence[np.ndarray], x: Array) -> Array:
    """Each spatial axis of x by a matrix of its own; by the one of all axes where that is small."""
    terms = math.prod(a.size for a in matrices) * x.shape[0] * x.shape[-1]
    if terms <= SMALL and explicit_sharding(x) is None:
        matrix = jnp.asarray(functools.reduce(np.kron, matrices), x.dtype)
        places = x.reshape(x.shape[0], matrix.shape[1], x.shape[-1])
        y = lax.dot_general(matrix, places, (((1,), (1,)), ((), ())))
        return y.swapaxes(0, 1).reshape(x.shape[0], *map(len, matrices), x.shape[-1])
    narrower = math.prod(len(a) / a.shape[1] for a in matrices) < 1
    axes = [*enumerate(matrices, 1)]
    for axis, own in axes if narrower else reversed(axes):
        x = _along(own, x, axis)
    return x


def _along(a: np.ndarray, x: Array, axis: int) -> Array:
    """The matrix times x along one axis, as a product for every place before it.

    So nothing is turned round: on CPU 0.3 of the time and 0.4 of the memory of one product.
    """
    places, lead = x.shape[:axis], tuple(range(axis))
    matrix = lax.broadcast(jnp.asarray(a, x.dtype), places)
    sharding = explicit_sharding(x)
    if sharding is not None:
        matrix = jax.sharding.reshard(
            matrix, sharding.update(spec=(*sharding.spec[:axis], None, None))
        )
    return lax.dot_general(matrix, x, (((axis + 1,), (axis,)), (lead, lead)))


def adaptive_average_pool_reference(x: Array, *, sizes: PerAxis) -> Array:
    y = upcast(x)
    for axis, parts in enumerate(np.broadcast_to(sizes, x.ndim - 2).tolist(), 1):
        length = y.shape[axis]
        bounds = [(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]
        means = [jnp.mean(lax.slice_in_dim(y, *own, axis=axis), axis) for own in bounds]
        y = jnp.stack(means, axis)
    return y.astype(x.dtype)


adaptive_average_pool = Op(
    "adaptive_average_pool",
    adaptive_average_pool_forward,
    adaptive_average_pool_backward,
    adaptive_average_pool_reference,
)


def _spatial(name: str, x: Array) -> tuple[int, ...]:
    """The spatial axes.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if there is none, or nothing along one.
    """
    need_floating(name, x)
    if x.ndim < 3 or 0 in x.shape[1:-1]:
        raise ValueError(
            f"{name} needs x of shape (B, *spatial, C) with at least one spatial axis and "
            f"something along each, got {x.shape}; add a missing channel axis with x[..., None]"
        )
    return tuple(range(1, x.ndim - 1))


def _over(y: Array, sizes: tuple[int, ...]) -> Array:
    """(B, C) at every position: (B, *sizes, C)."""
    shape = (y.shape[0], *sizes, y.shape[-1])
    sharding = explicit_sharding(y)
    if sharding is not None:
        spec = (sharding.spec[0], *[None] * len(sizes), sharding.spec[-1])
        sharding = sharding.update(spec=spec)
    return lax.broadcast_in_dim(y, shape, (0, len(shape) - 1), out_sharding=sharding)


def _positions(sizes: tuple[int, ...]) -> Array:
    """The number of each position, counted row by row: (1, *sizes, 1)."""
    return jnp.arange(math.prod(sizes), dtype=jnp.int32).reshape(1, *sizes, 1)
