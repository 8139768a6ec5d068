"""Convolution: every output sees a window of the input.

With stride s, dilation d and lo zeros in front (2-D and more: one of each for every axis):

    y[p, o] = sum_{k, i} x[s p + d k - lo, i] w[k, i, o]

The same weight is used at every place. It is blamed at all of them: what came in there, times the
error going out. An input is blamed by every window that it is in, through the tap k that it met:

    dw[k, i, o] = sum_p x[s p + d k - lo, i] dy[p, o]
    dx[q, i]    = sum_{p, k: s p + d k - lo = q} sum_o dy[p, o] w[k, i, o]

Both are convolutions again: dx of dy, with s - 1 zeros between its elements and the taps in
reverse; dw of x, with dy for a weight. With groups, inputs and outputs are split into as many
parts, and part sees part; a depthwise convolution is that with one input channel each.
"""

import numpy as np
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import like_primal
from backhand.ops.convolution_geometry import Geometry, geometry
from backhand.ops.convolution_lax import dimension_numbers
from backhand.ops.convolution_products import correlate, scatter, scatter_and_weights
from backhand.ops.settings import Padding, PerAxis
from backhand.protocol import Op, need_floating

Residuals = tuple[Float[Array, "B *S I"], Float[Array, "*K J O"]]


def convolution_forward(
    x: Float[Array, "B *S I"],
    w: Float[Array, "*K J O"],
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> tuple[Float[Array, "B *P O"], Residuals]:
    """Convolution over 1, 2 or 3 spatial axes, channels last.

    As everywhere in the field the taps are not reversed: it is a correlation.

    Args:
        x: inputs (B, *S, I).
        w: weights (*K, I / groups, O), cast to the dtype of x. Depthwise: groups = I, and
            (*K, 1, O) with O a multiple of I.
        stride: from one window to the next, one for all axes or one for each.
        padding: "SAME" for S / stride places, rounded up; "VALID" for windows inside the input;
            "CAUSAL" (one axis) for windows that end at their place; or zeros in front and behind
            for each axis, [(1, 1), (1, 1)].
        dilation: from one input of a window to the next, one for all axes or one for each.
        groups: into how many parts the channels are split; divides I and O.

    Returns:
        y (B, *P, O), in the dtype of x.

    Raises:
        TypeError: if x or w is not floating point, or a setting not an integer.
        ValueError: for another number of spatial axes than 1, 2 or 3, channels that do not fit w or
            groups, a window that reaches beyond the padded input, or an impossible setting.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([1.0, 2.0, 4.0]).reshape(1, 3, 1)
        >>> bh.ops.convolution(x, jnp.ones((2, 1, 1)), padding="CAUSAL").ravel().tolist()
        [1.0, 3.0, 6.0]
        >>> images = jnp.ones((8, 28, 28, 3))
        >>> bh.ops.convolution(images, jnp.ones((3, 3, 3, 16)), stride=2).shape
        (8, 14, 14, 16)

    References:
        LeCun et al., "Backpropagation applied to handwritten zip code recognition", 1989; Dumoulin
        and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """
    windows = windows_of(x, w, stride, padding, dilation, groups)
    return correlate(x, w.astype(x.dtype), windows), (x, w)


def convolution_backward(
    residuals: Residuals,
    dy: Float[Array, "B *P O"],
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> tuple[Float[Array, "B *S I"], Float[Array, "*K J O"]]:
    x, w = residuals
    windows = windows_of(x, w, stride, padding, dilation, groups)
    dx, dw = scatter_and_weights(x, dy, w.astype(dy.dtype), windows)
    return like_primal(dx, x), like_primal(dw, w)


def convolution_dx(
    dy: Float[Array, "B *P O"],
    w: Float[Array, "*K J O"],
    windows: Geometry,
    like: Float[Array, "B *S I"],
) -> Float[Array, "B *S I"]:
    """The error of the input, in its dtype and sharding."""
    return like_primal(scatter(dy, w.astype(dy.dtype), windows, like.shape[1:-1]), like)


def windows_of(
    x: Array, w: Array, stride: PerAxis, padding: Padding, dilation: PerAxis, groups: int
) -> Geometry:
    """Where the windows lie, of arguments that fit each other."""
    check_arrays("convolution", x, w)
    windows = geometry(
        "convolution", x.shape[1:-1], w.shape[:-2], stride, padding, dilation, groups
    )
    inputs, (own, outputs) = x.shape[-1], w.shape[-2:]
    if inputs % windows.groups or outputs % windows.groups:
        raise ValueError(
            f"convolution needs channels divisible by groups = {groups}, got {inputs} in x "
            f"{x.shape} and {outputs} at the end of w {w.shape}"
        )
    if own * windows.groups != inputs:
        raise ValueError(
            f"convolution needs w of shape (*K, I / groups, O) with I / groups = "
            f"{inputs // windows.groups} for x {x.shape} and groups = {groups}, got {w.shape}"
        )
    return windows


def check_arrays(name: str, x: Array, w: Array) -> None:
    """Refuses arrays without a common number of spatial axes.

    Raises:
        TypeError: if one is not floating point.
        ValueError: if x has not 1 to 3 spatial axes, or w not as many.
    """
    need_floating(name, x)
    need_floating(name, w, "w")
    if not 3 <= x.ndim <= 5:
        raise ValueError(
            f"{name} needs x of shape (B, *S, C) with 1, 2 or 3 spatial axes, got {x.shape}; a "
            "single example is a batch of one, x[None], and one channel an axis of its own, "
            "x[..., None]"
        )
    if w.ndim == x.ndim + 1:
        batch = "its batch axis: a single example is a batch of one, x[None]"
        channel = " or, of one channel, the axis of that: x[..., None]"
        raise ValueError(
            f"{name} needs x of shape (B, *S, C) with {w.ndim - 2} spatial axes for w of shape "
            f"{w.shape}, got {x.shape}; it seems to lack {batch}"
            f"{channel if 1 in w.shape[-2:] else ''}"
        )
    if w.ndim != x.ndim or 0 in w.shape:
        raise ValueError(
            f"{name} needs weights with {x.ndim - 2} axes for the taps and two for the channels, "
            f"none of length 0, for x of shape {x.shape}; got {w.shape}"
        )


def convolution_reference(
    x: Array,
    w: Array,
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    rank = x.ndim - 2
    strides, dilations = (np.broadcast_to(n, rank).tolist() for n in (stride, dilation))
    if padding == "CAUSAL":
        padding = [((w.shape[0] - 1) * dilations[0], 0)]
    return lax.conv_general_dilated(
        x,
        w.astype(x.dtype),
        strides,
        padding,
        rhs_dilation=dilations,
        dimension_numbers=dimension_numbers(rank),
        feature_group_count=groups,
    )


convolution = Op("convolution", convolution_forward, convolution_backward, convolution_reference)
