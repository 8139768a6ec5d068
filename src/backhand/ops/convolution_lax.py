"""The three products of a convolution as XLA's convolutions, on any backend.

`scatter` is the correlation of y, with stride - 1 zeros between its places, with the weight turned
round; `weights` that of x with y, where examples are the channels: y moves over x by the dilation,
with gaps of the stride.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype
from backhand.ops.convolution_geometry import Geometry

X = Float[Array, "B *S I"]
Y = Float[Array, "B *P O"]
W = Float[Array, "*K J O"]


def correlate(x: X, w: W, windows: Geometry) -> Y:
    return lax.conv_general_dilated(
        x,
        w,
        windows.stride,
        windows.padding,
        rhs_dilation=windows.dilation,
        dimension_numbers=dimension_numbers(windows.rank),
        feature_group_count=windows.groups,
    )


def scatter(y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]) -> X:
    back = windows.way_back(sizes, w.shape[:-2])
    return lax.conv_general_dilated(
        y,
        turned(w, windows.groups),
        back.stride,
        back.padding,
        lhs_dilation=windows.stride,
        rhs_dilation=windows.dilation,
        dimension_numbers=dimension_numbers(windows.rank),
        feature_group_count=windows.groups,
    )


def weights(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> W:
    padding = [
        (lo, reach + (p - 1) * s - n - lo)
        for reach, (lo, _), n, p, s in zip(
            windows.reach(kernel),
            windows.padding,
            x.shape[1:-1],
            y.shape[1:-1],
            windows.stride,
            strict=True,
        )
    ]
    # The axes are moved here, not named: XLA puts those of a convolution in the order that its fast
    # kernels on CPU take, but not within a loop (8 micro-batches of 4 x 16 x 16 x 64: 417 ms in a
    # scan where the axes were named, 6.5 ms so).
    dw = lax.conv_general_dilated(
        channels_of_examples(x, windows.groups),
        jnp.moveaxis(y, 0, -2),
        windows.dilation,
        padding,
        rhs_dilation=windows.stride,
        dimension_numbers=dimension_numbers(windows.rank),
        feature_group_count=windows.groups,
        preferred_element_type=accumulation_dtype(x.dtype, y.dtype),
    )
    return jnp.moveaxis(dw, 0, -2)


def channels_of_examples(x: X, groups: int) -> Float[Array, "J *S C"]:
    """x (B, *S, I) as (I / g, *S, g B): each group's examples its channels.

    With groups of the batch instead, XLA's partitioner counts some weights twice where a mesh has
    an axis that x is not split over.
    """
    split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    moved = jnp.moveaxis(jnp.moveaxis(split, -1, 0), 1, -1)
    return moved.reshape(*moved.shape[:-2], groups * x.shape[0])


def turned(w: W, groups: int) -> Float[Array, "*K P I"]:
    """The weight (*K, I / g, O) of the way back: taps in reverse, (*K, O / g, I)."""
    *kernel, inputs, outputs = w.shape
    split = jnp.flip(w, range(len(kernel))).reshape(*kernel, inputs, groups, outputs // groups)
    return split.swapaxes(-1, -3).reshape(*kernel, outputs // groups, groups * inputs)


def dimension_numbers(rank: int) -> tuple[str, str, str]:
    """Channels last: x (B, *S, C), w (*K, I, O)."""
    space = "DHW"[3 - rank :]
    return f"N{space}C", f"{space}IO", f"N{space}C"
