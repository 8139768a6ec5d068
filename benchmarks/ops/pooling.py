"""Pooling, both ways, against `lax.reduce_window`, whose maximum JAX reverses by a scatter.

Windows that tile the image are also a reshape and `jnp.max` or `jnp.mean`; the maximum of a reshape
splits the gradient of a tie, where `reduce_window`'s and ours goes to the first. PyTorch is given
both layouts; where SAME pads more at the end than at the beginning it pads evenly, to the same
output size.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import backhand as bh
from benchmarks.ops.case import Case, normal, sized
from benchmarks.ops.peer import Prepare, images

Windows = tuple[tuple[int, ...], tuple[int, ...], str]


def maxima(windows: Windows) -> Callable[[Array], Array]:
    window, stride, padding = windows
    how = (1, *window, 1), (1, *stride, 1), padding
    return lambda x: lax.reduce_window(x, -jnp.inf, lax.max, *how)


def means(windows: Windows) -> Callable[[Array], Array]:
    window, stride, padding = windows
    how = (1, *window, 1), (1, *stride, 1), padding

    def run(x: Array) -> Array:
        sums = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, *how)
        if padding == "VALID":
            return sums / math.prod(window)
        ones = jnp.ones((1, *x.shape[1:-1], 1), x.dtype)
        return sums / lax.reduce_window(ones, np.zeros((), x.dtype), lax.add, *how)

    return run


def tiles(reduce: Callable[..., Array], window: tuple[int, ...]) -> Callable[[Array], Array]:
    """Windows that do not overlap, each on axes of its own."""

    def run(x: Array) -> Array:
        sizes = zip(x.shape[1:-1], window, strict=True)
        split = (part for size, own in sizes for part in (size // own, own))
        axes = tuple(range(2, 2 * len(window) + 1, 2))
        return reduce(x.reshape(x.shape[0], *split, x.shape[-1]), axes)

    return run


def in_torch(name: str, windows: Windows) -> dict[str, Prepare]:
    """PyTorch's pooling of the same images."""
    window, stride, padding = windows
    even = tuple((k - 1) // 2 if padding == "SAME" else 0 for k in window)
    rank, more = len(window), {} if name == "max" else {"count_include_pad": False}

    def pool(functional: Any, x: Any) -> Any:
        return getattr(functional, f"{name}_pool{rank}d")(x, window, stride, even, **more)

    return images(pool, rank + 2)


def pooled(
    name: str, shape: tuple[int, ...], windows: Windows, dtype: str = "float32"
) -> Iterator[Case]:
    """Against each form that there is; only that of lax where dtype makes ties likely."""
    window, stride, padding = windows
    op = getattr(bh.ops, name).bind(window=window, stride=stride, padding=padding)
    form, reduce, torch = {
        "max_pool": (maxima, jnp.max, "max"),
        "average_pool": (means, jnp.mean, "avg"),
    }[name]
    what = f"{sized(*shape)}, {sized(*window)} stride {sized(*stride)}, {padding}"
    by_lax = form(windows)

    def case(against: str, theirs: Callable[[Array], Array], peers: dict[str, Prepare]) -> Case:
        return Case(
            name,
            f"{what}, against {against}",
            lambda: (normal(*shape, dtype=dtype),),
            op,
            theirs,
            peers,
            dtype,
            reference=by_lax,
        )

    yield case("reduce_window", by_lax, in_torch(torch, windows))
    if window == stride and padding == "VALID" and dtype == "float32":
        yield case("a reshape", tiles(reduce, window), {})


def whole(shape: tuple[int, ...]) -> Iterator[Case]:
    """Global pooling."""
    both = (
        ("global_average_pool", jnp.mean, lambda _, x: x.mean((2, 3))),
        ("global_max_pool", jnp.max, lambda _, x: x.amax((2, 3))),
    )
    for name, reduce, torch in both:
        yield Case(
            name,
            sized(*shape),
            lambda: (normal(*shape),),
            getattr(bh.ops, name),
            lambda x, reduce=reduce: reduce(x, (1, 2)),
            images(torch, 4),
        )


def bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """The windows of adaptive pooling."""
    return [(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]


def by_slices(x: Array, sizes: tuple[int, ...]) -> Array:
    """A mean over each window, axis by axis; a reshape where windows do not overlap."""
    for axis, parts in enumerate(sizes, 1):
        length = x.shape[axis]
        if length % parts == 0:
            split = (*x.shape[:axis], parts, length // parts, *x.shape[axis + 1 :])
            x = jnp.mean(x.reshape(split), axis + 1)
            continue
        windows = bounds(length, parts)
        own = [jnp.mean(lax.slice_in_dim(x, *b, axis=axis), axis) for b in windows]
        x = jnp.stack(own, axis)
    return x


def by_matrices(x: Array, sizes: tuple[int, ...]) -> Array:
    """Each axis by a matrix whose rows average a window."""
    for axis, parts in enumerate(sizes, 1):
        matrix = np.zeros((parts, x.shape[axis]))
        for row, (first, end) in enumerate(bounds(x.shape[axis], parts)):
            matrix[row, first:end] = 1 / (end - first)
        rows = jnp.tensordot(jnp.asarray(matrix, x.dtype), x, (1, axis))
        x = jnp.moveaxis(rows, 0, axis)
    return x


def adaptive(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    rank = len(sizes)
    forms = {"slices": by_slices, "matrices": by_matrices}
    if all(length % parts == 0 for length, parts in zip(shape[1:], sizes, strict=False)):
        forms = {"a reshape": by_slices}
    for against, form in forms.items():
        yield Case(
            "adaptive_average_pool",
            f"{sized(*shape)} to {sized(*sizes)}, against {against}",
            lambda: (normal(*shape),),
            bh.ops.adaptive_average_pool.bind(sizes=sizes),
            lambda x, form=form: form(x, sizes),
            images(lambda f, x: getattr(f, f"adaptive_avg_pool{rank}d")(x, sizes), rank + 2),
        )


def cases() -> Iterator[Case]:
    image, two, three = (64, 32, 32, 32), ((2, 2), (2, 2), "VALID"), ((3, 3), (2, 2), "VALID")
    for name in ("max_pool", "average_pool"):
        yield from pooled(name, (8, 8, 8, 16), two)
        yield from pooled(name, image, two)
        yield from pooled(name, image, two, "bfloat16")
        yield from pooled(name, image, three)
        yield from pooled(name, image, ((3, 3), (2, 2), "SAME"))
        yield from pooled(name, (16, 32, 32, 64), ((3, 3), (1, 1), "SAME"))
        yield from pooled(name, (64, 512, 32), ((2,), (2,), "VALID"))
        yield from pooled(name, (8, 16, 16, 16, 16), ((2, 2, 2), (2, 2, 2), "VALID"))
    for shape in ((8, 4, 4, 16), (64, 8, 8, 128), image):
        yield from whole(shape)
    for shape in ((16, 14, 14, 256), (16, 15, 17, 256), (2, 9, 9, 4)):
        yield from adaptive(shape, (7, 7))
    yield from adaptive((64, 100, 32), (7,))
