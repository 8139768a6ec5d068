"""Transposed convolution: every input gives to a window of the output.

It is the way back of a convolution taken forward, from its places to its inputs. With stride s,
dilation d and lo outputs cut off in front:

    y[q, o] = sum_{p, k: s p + d k - lo = q} sum_i x[p, i] w[k, o, i]

So its own way back is that convolution: an input is blamed for the whole window that it gave to.

    dx[p, i]    = sum_{k, o} dy[s p + d k - lo, o] w[k, o, i]
    dw[k, o, i] = sum_p      dy[s p + d k - lo, o] x[p, i]

The weight is the convolution's too, (*K, O / groups, I), and its gradient the same sum with x and
dy in each other's place.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import like_primal
from backhand.contributions import Windows, total
from backhand.ops.convolution import check_arrays
from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_lax import dimension_numbers
from backhand.ops.convolution_products import Weights, correlate, scatter
from backhand.ops.settings import Padding, PerAxis, integer, pairs, per_axis
from backhand.protocol import Op

Residuals = tuple[Float[Array, "B *P I"], Float[Array, "*K J I"]]


def transposed_convolution_forward(
    x: Float[Array, "B *P I"],
    w: Float[Array, "*K J I"],
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> tuple[Float[Array, "B *S O"], Residuals]:
    """Transposed convolution over 1, 2 or 3 spatial axes, channels last.

    Its sizes are those of `jax.lax.conv_transpose`: with P inputs and windows that reach over
    d (K - 1) + 1, "SAME" gives P stride outputs and "VALID" (P - 1) stride + max(reach, stride).
    Explicit padding is the convolution's: (P - 1) stride + reach outputs, less what it cuts off.

    Args:
        x: inputs (B, *P, I).
        w: weights (*K, O / groups, I), cast to the dtype of x; those of the convolution from O to I
            channels that this is the transpose of, as in `jax.lax.conv_transpose` with
            `transpose_kernel`.
        stride: how far apart neighbours give, one for all axes or one for each.
        padding: "SAME", "VALID", or how much to cut off in front and behind for each axis,
            [(1, 1), (1, 1)].
        dilation: from one output of a window to the next, one for all axes or one for each.
        groups: into how many parts the channels are split; divides I and O.

    Returns:
        y (B, *S, O), in the dtype of x.

    Raises:
        TypeError: if x or w is not floating point, or a setting not an integer.
        ValueError: for another number of spatial axes than 1, 2 or 3, channels that do not fit w or
            groups, an output without elements, or an impossible setting.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([1.0, 2.0]).reshape(1, 2, 1)
        >>> w = jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
        >>> bh.ops.transposed_convolution(x, w, stride=2, padding="VALID").ravel().tolist()
        [1.0, 10.0, 102.0, 20.0, 200.0]

    References:
        Zeiler et al., "Deconvolutional networks", 2010; Dumoulin and Visin, "A guide to convolution
        arithmetic for deep learning", 2016.
    """
    windows, sizes = windows_onto(x, w, stride, padding, dilation, groups)
    return scatter(x, w.astype(x.dtype), windows, sizes), (x, w)


def transposed_convolution_backward(
    residuals: Residuals,
    dy: Float[Array, "B *S O"],
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> tuple[Float[Array, "B *P I"], Float[Array, "*K J I"]]:
    x, w = residuals
    windows, _ = windows_onto(x, w, stride, padding, dilation, groups)
    dw = total(Windows(dy, x, Weights(windows)), w)
    return transposed_convolution_dx(dy, w, windows, x), dw


def transposed_convolution_dx(
    dy: Float[Array, "B *S O"],
    w: Float[Array, "*K J I"],
    windows: Geometry,
    like: Float[Array, "B *P I"],
) -> Float[Array, "B *P I"]:
    """The error of the input, in its dtype and sharding."""
    return like_primal(correlate(dy, w.astype(dy.dtype), windows), like)


def windows_onto(
    x: Array, w: Array, stride: PerAxis, padding: Padding, dilation: PerAxis, groups: int
) -> tuple[Geometry, tuple[int, ...]]:
    """Where the windows lie in the output, and its sizes, of arguments that fit each other."""
    name = "transposed_convolution"
    check_arrays(name, x, w)
    kernel, places, rank = w.shape[:-2], x.shape[1:-1], x.ndim - 2
    strides = per_axis(name, "stride", stride, rank)
    dilations = per_axis(name, "dilation", dilation, rank)
    own = integer(name, "groups", groups)
    if w.shape[-1] != x.shape[-1] or x.shape[-1] % own:
        raise ValueError(
            f"{name} needs w of shape (*K, O / groups, I) for x (B, *P, I), and I divisible by "
            f"groups = {groups}; got {w.shape} and {x.shape}"
        )
    windows = Geometry(strides, (), dilations, own)
    reach = windows.reach(kernel)
    axes = list(zip(places, strides, reach, strict=True))
    if padding == "SAME":
        sizes = tuple(p * s for p, s, _ in axes)
        cut = tuple(divmod(max(window - s, 0), 2) for _, s, window in axes)
        padded = tuple((half, half + odd) for half, odd in cut)
    elif padding == "VALID":
        sizes = tuple((p - 1) * s + max(window, s) for p, s, window in axes)
        padded = ((0, 0),) * rank
    else:
        padded = pairs(name, padding, rank, ("SAME", "VALID"))
        ends = zip(axes, padded, strict=True)
        sizes = tuple((p - 1) * s + window - sum(pad) for (p, s, window), pad in ends)
    if min(places) < 1 or min(sizes) < 1:
        raise ValueError(
            f"{name} needs at least one input, and one output left, on each axis; x {x.shape} with "
            f"w {w.shape}, stride {stride} and padding {padding} gives outputs of {sizes}"
        )
    return Geometry(strides, padded, dilations, own), sizes


def transposed_convolution_reference(
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
    if not isinstance(padding, str):  # of the input between zeros, in lax
        reach = [d * (k - 1) for d, k in zip(dilations, w.shape[:-2], strict=True)]
        padding = [(r - lo, r - hi) for r, (lo, hi) in zip(reach, padding, strict=True)]
    parts = [
        lax.conv_transpose(
            part,
            own,
            strides,
            padding,
            rhs_dilation=dilations,
            dimension_numbers=dimension_numbers(rank),
            transpose_kernel=True,
        )
        for part, own in zip(
            jnp.split(x, groups, -1), jnp.split(w.astype(x.dtype), groups, -1), strict=True
        )
    ]
    return jnp.concatenate(parts, -1)


transposed_convolution = Op(
    "transposed_convolution",
    transposed_convolution_forward,
    transposed_convolution_backward,
    transposed_convolution_reference,
)
