"""Gated linear units: one half of the features says how much of the other passes.

    y = act(gate) value

Each factor is blamed as far as the other let it matter:

    dgate = dy value act'(gate)        dvalue = dy act(gate)

Where the gate is shut the value gets no blame, as in an LSTM; where the value is 0 the gate gets
none. `glu` gates by a sigmoid, `swiglu` by silu, `geglu` by gelu.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from backhand.arrays import accumulation_dtype, like_primal
from backhand.ops.activations import (
    elu,
    gelu,
    leaky_relu,
    relu,
    sigmoid,
    silu,
    softplus,
    tanh,
)
from backhand.protocol import Op, listed, need_floating

X = Float[Array, "*shape"]

ACTIVATIONS = {op.name: op for op in (elu, gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh)}
ACTIVATIONS["gelu_tanh"] = gelu.bind(approximate=True)
"""By name: what an activation of a feed-forward block may be."""


def activation_of(activation: str | Op) -> Op:
    """The activation of that name, or the op itself."""
    return activation if isinstance(activation, Op) else ACTIVATIONS[activation]


def checked_activation(name: str, activation: object) -> Op:
    """`activation_of` what may be no activation.

    Raises:
        ValueError: for a name that there is not.
        TypeError: for what is neither a name nor an op.
    """
    if isinstance(activation, Op):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"{name} needs an activation by name, or an op of one array such as "
            f"bh.ops.elu.bind(alpha=0.5); got {activation!r}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name} needs an activation that is one of {listed(ACTIVATIONS)}, or an op of one "
            f"array; got {activation!r}"
        )
    return activation_of(activation)


class Residuals(NamedTuple):
    """What came in; the activation is computed again."""

    gate: X
    value: X


# gated --------------------------------------------------------------------------------------------


def gated_forward(gate: X, value: X, *, activation: str | Op = "silu") -> tuple[X, Residuals]:
    """act(gate) value, elementwise; see the top of the file for the derivatives.

    Args:
        gate: of any shape.
        value: of the same shape.
        activation: an activation of this package by name, or "gelu_tanh", or an op of one array.

    Returns:
        y, in their dtype; where they differ, in at least float32.

    Raises:
        TypeError: if gate or value are not floating point.
        ValueError: if their shapes differ, or for another activation.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.gated(jnp.array([0.0, 2.0]), jnp.array([5.0, 5.0]), activation="relu").tolist()
        [0.0, 10.0]

    References:
        Dauphin et al., "Language modeling with gated convolutional networks", 2016.
        Shazeer, "GLU variants improve transformer", 2020.
    """
    act = checked_activation("gated", activation)
    need_floating("gated", gate, "gate")
    need_floating("gated", value, "value")
    if gate.shape != value.shape:
        raise ValueError(
            f"gated needs gate and value of one shape, got {gate.shape} and {value.shape}; halves "
            "of one array are jnp.split(x, 2, axis=-1)"
        )
    own, other = _alike(gate, value)
    return act.forward(own)[0] * other, Residuals(gate, value)


def gated_backward(residuals: Residuals, dy: X, *, activation: str | Op = "silu") -> tuple[X, X]:
    gate, value = residuals
    act = activation_of(activation)
    own, other = _alike(gate, value)
    opened, saved = act.forward(own)
    dvalue = like_primal(dy * opened, value)  # first: inside a block XLA then needs less memory
    dgate = act.cotangents(saved, dy * other)[0]
    return like_primal(dgate, gate), dvalue


def gated_reference(gate: Array, value: Array, *, activation: str | Op = "silu") -> Array:
    gate, value = _alike(gate, value)
    return activation_of(activation).reference(gate) * value


def _alike(gate: Array, value: Array) -> tuple[Array, Array]:
    """Both in one dtype: theirs, or where they differ one that holds both."""
    if gate.dtype == value.dtype:
        return gate, value
    wide = accumulation_dtype(gate.dtype, value.dtype)
    return gate.astype(wide), value.astype(wide)


gated = Op("gated", gated_forward, gated_backward, gated_reference)


def _reference(act: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """`act(gate) value` as it is written."""

    def reference(gate: Array, value: Array) -> Array:
        gate, value = _alike(gate, value)
        return act(gate) * value

    return reference


# glu ----------------------------------------------------------------------------------------------


def glu_forward(gate: X, value: X) -> tuple[X, Residuals]:
    """sigmoid(gate) value, the gated linear unit.

    With s = sigmoid(gate), dgate = dy value s (1 - s): unlike behind a plain sigmoid, the error of
    the value is scaled by s alone, so that blame passes an open gate whole.

    Args:
        gate: of any shape.
        value: of the same shape.

    Returns:
        y, in their dtype; where they differ, in at least float32.

    Raises:
        TypeError: if gate or value are not floating point.
        ValueError: if their shapes differ.

    Example:
        >>> import backhand as bh
        >>> float(bh.ops.glu(0.0, 3.0))
        1.5

    References:
        Dauphin et al., "Language modeling with gated convolutional networks", 2016.
    """
    return gated_forward(gate, value, activation="sigmoid")


def glu_backward(residuals: Residuals, dy: X) -> tuple[X, X]:
    return gated_backward(residuals, dy, activation="sigmoid")


glu = Op("glu", glu_forward, glu_backward, _reference(jax.nn.sigmoid))

# swiglu -------------------------------------------------------------------------------------------


def swiglu_forward(gate: X, value: X) -> tuple[X, Residuals]:
    """silu(gate) value = gate sigmoid(gate) value.

    Args:
        gate: of any shape.
        value: of the same shape.

    Returns:
        y, in their dtype; where they differ, in at least float32.

    Raises:
        TypeError: if gate or value are not floating point.
        ValueError: if their shapes differ.

    Example:
        >>> import backhand as bh
        >>> round(float(bh.ops.swiglu(1.0, 2.0)), 4)
        1.4621

    References:
        Shazeer, "GLU variants improve transformer", 2020.
    """
    return gated_forward(gate, value, activation="silu")


def swiglu_backward(residuals: Residuals, dy: X) -> tuple[X, X]:
    return gated_backward(residuals, dy, activation="silu")


swiglu = Op("swiglu", swiglu_forward, swiglu_backward, _reference(jax.nn.silu))

# geglu --------------------------------------------------------------------------------------------


def geglu_forward(gate: X, value: X, *, approximate: bool = False) -> tuple[X, Residuals]:
    """gelu(gate) value: exact by erf, or approximate by tanh.

    Args:
        gate: of any shape.
        value: of the same shape.
        approximate: whether by tanh.

    Returns:
        y, in their dtype; where they differ, in at least float32.

    Raises:
        TypeError: if gate or value are not floating point.
        ValueError: if their shapes differ.

    Example:
        >>> import backhand as bh
        >>> round(float(bh.ops.geglu(1.0, 2.0)), 4)
        1.6827

    References:
        Shazeer, "GLU variants improve transformer", 2020.
    """
    return gated_forward(gate, value, activation=_gelu(approximate))


def geglu_backward(residuals: Residuals, dy: X, *, approximate: bool = False) -> tuple[X, X]:
    return gated_backward(residuals, dy, activation=_gelu(approximate))


def _gelu(approximate: bool) -> str:
    return "gelu_tanh" if approximate else "gelu"


def geglu_reference(gate: Array, value: Array, *, approximate: bool = False) -> Array:
    return _reference(functools.partial(jax.nn.gelu, approximate=approximate))(gate, value)


geglu = Op("geglu", geglu_forward, geglu_backward, geglu_reference)
