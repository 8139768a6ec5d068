"""Convolutional layers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, last_axis, whole_number
from backhand.contributions import Total, Windows
from backhand.ops.convolution import convolution_dx, windows_of
from backhand.ops.convolution_products import Weights
from backhand.ops.settings import Padding, PerAxis, per_axis
from backhand.ops.transposed_convolution import transposed_convolution_dx, windows_onto
from backhand.protocol import Layer, layer, need_floating
from backhand.visit import Params, PyTree


def conv(
    features: int,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
    bias: bool = True,
    initializer: Initializer | None = None,
) -> Layer:
    """Convolution over 1, 2 or 3 spatial axes, from (B, *S, I) to (B, *P, O).

    Parameters: w (*K, I / groups, O), and b (O,) unless `bias` is off; float32, or float64 for
    float64 inputs. The derivation is with `backhand.ops.convolution`.

    Args:
        features: O.
        kernel_size: K, one for all spatial axes of the input or one for each.
        stride: from one window to the next.
        padding: "SAME", "VALID", "CAUSAL" or pairs, as in `backhand.ops.convolution`.
        dilation: from one input of a window to the next.
        groups: into how many parts the channels are split.
        bias: whether there is a b; it begins at zero.
        initializer: of w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: if features < 1; at init, for what `backhand.ops.convolution` refuses.

    Example:
        >>> layer = conv(16, 3, stride=2)
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 28, 28, 1), "float32"))
        >>> params["w"].shape, layer(params, jnp.ones((8, 28, 28, 1))).shape
        ((3, 3, 1, 16), (8, 14, 14, 16))
    """
    _need_features("conv", features)
    make = lecun_normal() if initializer is None else initializer

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        kernel = _kernel("conv", kernel_size, x)
        own = per_axis("conv", "groups", groups, 1)[0]
        if x.shape[-1] % own:
            raise ValueError(f"conv needs channels divisible by groups = {groups}, got x {x.shape}")
        return _params(key, x, make, (*kernel, x.shape[-1] // own, features), features, bias)

    return _windowed("conv", init, stride, padding, dilation, lambda x: groups)


def depthwise_conv(
    kernel_size: PerAxis,
    *,
    multiplier: int = 1,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    bias: bool = True,
    initializer: Initializer | None = None,
) -> Layer:
    """Convolution of each channel alone, from (B, *S, C) to (B, *P, C multiplier).

    Parameters: w (*K, 1, C multiplier), and b unless `bias` is off; float32, or float64 for float64
    inputs.

    Args:
        kernel_size: K, one for all spatial axes of the input or one for each.
        multiplier: how many outputs each channel has.
        stride: from one window to the next.
        padding: "SAME", "VALID", "CAUSAL" or pairs, as in `backhand.ops.convolution`.
        dilation: from one input of a window to the next.
        bias: whether there is a b; it begins at zero.
        initializer: of w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: if multiplier < 1; at init, for what `backhand.ops.convolution` refuses.

    Example:
        >>> layer = depthwise_conv(4, padding="CAUSAL")
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 9, 8), "float32"))
        >>> params["w"].shape, layer(params, jnp.ones((2, 9, 8))).shape
        ((4, 1, 8), (2, 9, 8))

    References:
        Chollet, "Xception: deep learning with depthwise separable convolutions", 2016.
    """
    if whole_number("multiplier", multiplier) < 1:
        raise ValueError(f"depthwise_conv needs a multiplier of at least 1, got {multiplier}")
    make = lecun_normal() if initializer is None else initializer

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        kernel, features = _kernel("depthwise_conv", kernel_size, x), x.shape[-1] * multiplier
        return _params(key, x, make, (*kernel, 1, features), features, bias)

    return _windowed("depthwise_conv", init, stride, padding, dilation, lambda x: x.shape[-1])


def conv_transpose(
    features: int,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
    bias: bool = True,
    initializer: Initializer | None = None,
) -> Layer:
    """Transposed convolution over 1, 2 or 3 spatial axes, from (B, *P, I) to (B, *S, O).

    Parameters: w (*K, O / groups, I), and b (O,) unless `bias` is off; float32, or float64 for
    float64 inputs. The derivation is with `backhand.ops.transposed_convolution`.

    Args:
        features: O, divisible by groups.
        kernel_size: K, one for all spatial axes of the input or one for each.
        stride: how far apart neighbours give.
        padding: "SAME", "VALID" or pairs, as in `backhand.ops.transposed_convolution`.
        dilation: from one output of a window to the next.
        groups: into how many parts the channels are split.
        bias: whether there is a b; it begins at zero.
        initializer: of w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: if features < 1 or not divisible by groups; at init, for what
            `backhand.ops.transposed_convolution` refuses.

    Example:
        >>> layer = conv_transpose(3, 4, stride=2)
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((8, 7, 7, 16), "float32"))
        >>> params["w"].shape, layer(params, jnp.ones((8, 7, 7, 16))).shape
        ((4, 4, 3, 16), (8, 14, 14, 3))
    """
    _need_features("conv_transpose", features)
    (own,) = per_axis("conv_transpose", "groups", groups, 1)
    if features % own:
        raise ValueError(
            f"conv_transpose needs features divisible by groups = {groups}, got {features}"
        )
    make = lecun_normal(in_axis=-1, out_axis=-2) if initializer is None else initializer
    settings: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        kernel = _kernel("conv_transpose", kernel_size, x)
        return _params(key, x, make, (*kernel, features // own, x.shape[-1]), features, bias)

    def forward(params: Params, x: Float[Array, "B *P I"]) -> tuple[Array, Array]:
        y, _ = ops.transposed_convolution.forward(x, params["w"], **settings)
        return _plus_bias(params, y), x

    def rule(params: Params, x: Array, dy: Array) -> tuple[PyTree, Array]:
        windows, _ = windows_onto(x, params["w"], **settings)
        dx = transposed_convolution_dx(dy, params["w"], windows, x)
        return _contributions(params, Windows(dy, x, Weights(windows)), dy), dx

    return layer("conv_transpose", _tried(init, forward), forward, rule)


def _windowed(
    name: str,
    init: Callable[..., Params],
    stride: PerAxis,
    padding: Padding,
    dilation: PerAxis,
    groups_of: Callable[[Array], int],
) -> Layer:
    """A layer that is a convolution, with groups that may depend on its input."""
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}

    def forward(params: Params, x: Float[Array, "B *S I"]) -> tuple[Array, Array]:
        need_floating(name, x)
        own = {**settings, "groups": groups_of(x)}
        return _plus_bias(params, ops.convolution.forward(x, params["w"], **own)[0]), x

    def rule(params: Params, x: Array, dy: Array) -> tuple[PyTree, Array]:
        windows = windows_of(x, params["w"], **settings, groups=groups_of(x))
        dx = convolution_dx(dy, params["w"], windows, x)
        return _contributions(params, Windows(x, dy, Weights(windows)), dy), dx

    return layer(name, _tried(init, forward), forward, rule)


def _tried(init: Callable[..., Params], forward: Callable[..., Any]) -> Callable[..., Params]:
    """The same init, but what forward refuses is refused there."""

    def tried(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        jax.eval_shape(forward, jax.eval_shape(lambda key: init(key, x), key), x)
        return init(key, x)

    return tried


def _params(
    key: Array,
    x: jax.ShapeDtypeStruct,
    make: Initializer,
    shape: Sequence[int],
    features: int,
    bias: bool,
) -> Params:
    dtype = accumulation_dtype(x.dtype)
    w = make(key, tuple(shape), dtype)
    return {"w": w, "b": jnp.zeros(features, dtype)} if bias else {"w": w}


def _plus_bias(params: Params, y: Array) -> Array:
    return y + last_axis(params["b"].astype(y.dtype), y) if "b" in params else y


def _contributions(params: Params, w: Windows, dy: Array) -> PyTree:
    return {"w": w, "b": Total(dy)} if "b" in params else {"w": w}


def _kernel(name: str, kernel_size: PerAxis, x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The kernel's sizes, for the spatial axes of x."""
    need_floating(name, x)
    if not 3 <= len(x.shape) <= 5:
        raise ValueError(
            f"{name} needs x of shape (B, *S, C) with 1, 2 or 3 spatial axes, got {x.shape}"
        )
    return per_axis(name, "kernel_size", kernel_size, len(x.shape) - 2)


def _need_features(name: str, features: int) -> None:
    if whole_number(f"{name}'s features", features) < 1:
        raise ValueError(f"{name} needs at least 1 feature, got {features}")
