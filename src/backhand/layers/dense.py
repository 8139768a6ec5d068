"""The dense (fully connected) layer."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, whole_number
from backhand.contributions import Outer, Total
from backhand.ops.linear import linear_dx
from backhand.protocol import Layer, layer, need_floating
from backhand.visit import Params, PyTree


def dense(features: int, *, bias: bool = True, initializer: Initializer | None = None) -> Layer:
    """y = x w + b, from (..., I) to (..., O).

    Parameters: w (I, O), and b (O,) unless `bias` is off; float32, or float64 for float64 inputs.
    The derivation is with `backhand.ops.linear`.

    Args:
        features: O.
        bias: whether there is a b; it begins at zero.
        initializer: of w, `(key, shape, dtype) -> array`; LeCun's normal by default. Before a relu,
            `jax.nn.initializers.he_normal()` keeps the scale.

    Raises:
        ValueError: if features < 1; when run, for an input of another feature count.

    Example:
        >>> layer = dense(10)
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((32, 64), "float32"))
        >>> params["w"].shape, params["b"].shape
        ((64, 10), (10,))
    """
    if whole_number("dense's features", features) < 1:
        raise ValueError(f"dense needs at least 1 feature, got {features}")
    make = lecun_normal() if initializer is None else initializer

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        need_floating("dense", x)
        if len(x.shape) < 1:
            raise ValueError("dense needs x of shape (..., I), got a scalar")
        dtype = accumulation_dtype(x.dtype)
        w = make(key, (x.shape[-1], features), dtype)
        return {"w": w, "b": jnp.zeros(features, dtype)} if bias else {"w": w}

    def forward(params: Params, x: Float[Array, "... I"]) -> tuple[Array, Array]:
        return linear(params, x), x

    def rule(params: Params, x: Array, dy: Array) -> tuple[PyTree, Array]:
        return linear_uses(params, x, dy), linear_dx(dy, params["w"], x)

    return layer("dense", init, forward, rule)


def linear(params: Params, x: Array) -> Array:
    """X w, and + b where there is one."""
    return ops.linear.forward(x, params["w"], params.get("b"))[0]


def linear_uses(params: Params, x: Array, dy: Array) -> PyTree:
    """What the error of `linear` adds to w, and to b where there is one."""
    return {"w": Outer(x, dy), "b": Total(dy)} if "b" in params else {"w": Outer(x, dy)}
