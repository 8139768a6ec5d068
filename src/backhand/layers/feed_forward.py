"""The feed-forward blocks of a transformer: plain and gated."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, whole_number
from backhand.contributions import Outer
from backhand.layers.dense import linear, linear_uses
from backhand.ops.gated import checked_activation
from backhand.ops.linear import linear_dx
from backhand.protocol import Layer, Op, layer, need_floating
from backhand.visit import Params, PyTree


def mlp(
    hidden: int,
    features: int | None = None,
    *,
    activation: str | Op = "gelu",
    bias: bool = True,
    initializer: Initializer | None = None,
) -> Layer:
    """y = act(x w1 + b1) w2 + b2, from (..., D) to (..., features), the same for every position.

    With z = x w1 + b1 and h = act(z), in reverse:

        dw2 = h^T dy      db2 = sum dy      dh = dy w2^T
        dz = dh act'(z)
        dw1 = x^T dz      db1 = sum dz      dx = dz w1^T

    Saves x and z; h is computed again. A deeper one is a `chain` of `dense` and activations.

    Parameters: hidden and out, each with w, and b unless `bias` is off.

    Args:
        hidden: H, the features in between.
        features: of y; by default those of x.
        activation: an activation of `backhand.ops` by name, or "gelu_tanh", or any op of one array.
        bias: whether there are b; they begin at zero.
        initializer: of each w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: for sizes below 1, another activation; when run, for other features.
        TypeError: when run, if x is not floating point.

    Example:
        >>> layer = mlp(64, activation="relu")
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5, 16), "float32"))
        >>> params["hidden"]["w"].shape, params["out"]["w"].shape
        ((16, 64), (64, 16))
    """
    act, make = checked_activation("mlp", activation), _initializer(initializer)
    _check_sizes("mlp", hidden, features)

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        dtype, width = _check("mlp", x), x.shape[-1]
        shapes = {"hidden": (width, hidden), "out": (hidden, features or width)}
        params: dict[str, dict[str, Array]] = {
            name: {"w": make(own, shapes[name], dtype)}
            for own, name in zip(jax.random.split(key), shapes, strict=True)
        }
        if bias:
            for part in params.values():
                part["b"] = jnp.zeros(part["w"].shape[1], dtype)
        return params

    def forward(params: Params, x: Float[Array, "... D"]) -> tuple[Array, PyTree]:
        z = linear(params["hidden"], x)
        return linear(params["out"], act.forward(z)[0]), (x, z)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, Array]:
        x, z = residuals
        h, saved = act.forward(z)
        dh = linear_dx(dy, params["out"]["w"], h)
        (dz,) = act.cotangents(saved, dh)
        dparams = {
            "hidden": linear_uses(params["hidden"], x, dz),
            "out": linear_uses(params["out"], h, dy),
        }
        return dparams, linear_dx(dz, params["hidden"]["w"], x)

    return layer("mlp", init, forward, rule)


def gated_mlp(
    hidden: int,
    features: int | None = None,
    *,
    activation: str | Op = "silu",
    initializer: Initializer | None = None,
) -> Layer:
    """y = (act(x w_gate) (x w_value)) w_out, from (..., D) to (..., features); no bias.

    With "silu" the SwiGLU block, with "gelu" GEGLU, with "sigmoid" GLU. With u = x w_gate,
    v = x w_value and h = act(u) v, in reverse:

        dw_out = h^T dy      dh = dy w_out^T
        du = dh v act'(u)    dv = dh act(u)
        dw_gate = x^T du     dw_value = x^T dv      dx = du w_gate^T + dv w_value^T

    Saves x, u and v; act(u) and h are computed again. At equal parameters H is two thirds of that
    of an `mlp`.

    Parameters: w_gate (D, H), w_value (D, H), w_out (H, features).

    Args:
        hidden: H.
        features: of y; by default those of x.
        activation: of the gate, as `mlp` takes it.
        initializer: of each w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: for sizes below 1, another activation; when run, for other features.
        TypeError: when run, if x is not floating point.

    Example:
        >>> layer = gated_mlp(64)
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5, 16), "float32"))
        >>> {name: w.shape for name, w in params.items()}
        {'w_gate': (16, 64), 'w_value': (16, 64), 'w_out': (64, 16)}

    References:
        Shazeer, "GLU variants improve transformer", 2020.
    """
    act, make = checked_activation("gated_mlp", activation), _initializer(initializer)
    _check_sizes("gated_mlp", hidden, features)

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        dtype, width = _check("gated_mlp", x), x.shape[-1]
        gate, value, out = jax.random.split(key, 3)
        return {
            "w_gate": make(gate, (width, hidden), dtype),
            "w_value": make(value, (width, hidden), dtype),
            "w_out": make(out, (hidden, features or width), dtype),
        }

    def forward(params: Params, x: Float[Array, "... D"]) -> tuple[Array, PyTree]:
        u, v = (ops.linear.forward(x, params[name])[0] for name in ("w_gate", "w_value"))
        h, residuals = ops.gated.forward(u, v, activation=act)
        return ops.linear.forward(h, params["w_out"])[0], (x, residuals)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, Array]:
        x, (u, v) = residuals
        h, of_gate = ops.gated.forward(u, v, activation=act)
        dh = linear_dx(dy, params["w_out"], h)
        du, dv = ops.gated.backward(of_gate, dh, activation=act)
        dx = linear_dx(dv, params["w_value"], x) + linear_dx(du, params["w_gate"], x)
        return {"w_gate": Outer(x, du), "w_value": Outer(x, dv), "w_out": Outer(h, dy)}, dx

    return layer("gated_mlp", init, forward, rule)


def _initializer(given: Initializer | None) -> Initializer:
    return lecun_normal() if given is None else given


def _check(name: str, x: jax.ShapeDtypeStruct) -> Any:
    """The dtype of the parameters.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if it has no features.
    """
    need_floating(name, x)
    if len(x.shape) < 1:
        raise ValueError(f"{name} needs x of shape (..., D), got a scalar")
    return accumulation_dtype(x.dtype)


def _check_sizes(name: str, hidden: int, features: int | None) -> None:
    for what, size in (("hidden", hidden), ("features", features)):
        if size is not None and whole_number(f"{name}'s {what}", size) < 1:
            raise ValueError(f"{name} needs at least 1 for {what}, got {size}")
