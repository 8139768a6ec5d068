"""The table's rows of convolutions."""

from collections.abc import Callable
from typing import Any

from jax import Array

from backhand import layers, ops
from backhand.arrays import last_axis
from backhand.catalogue.row import Row, Spec
from backhand.protocol import Op
from backhand.visit import Params

ONE, TWO, THREE = "B 6 D", "B 6 5 D", "B 4 3 3 D"
NO_BATCH = ({"B": 1}, {"B": 0})


def _op(op: Op, x: str, w: str, **settings: Any) -> Row:
    """An op of inputs and a weight."""
    edges = (*NO_BATCH, {"D": 1, "O": 1}) if {"D", "O"} <= set(w.split()) else NO_BATCH
    inputs = (Spec("normal", x), Spec("normal", w, wide=True))
    return Row(f"ops.{op.name}", op, inputs, settings, edges=edges)


def _textbook(op: Op, **settings: Any) -> Callable[[Params, Array], Array]:
    """A layer as its op's reference."""

    def run(params: Params, x: Array) -> Array:
        y = op.reference(x, params["w"], **settings)
        return y + last_axis(params["b"].astype(y.dtype), y) if "b" in params else y

    return run


def _layer(name: str, op: Op, x: str, own: dict[str, Any], **settings: Any) -> Row:
    """A layer, which parameters of 8 channels belong to."""
    textbook = _textbook(op, **settings)
    given = {
        **own,
        **{k: v for k, v in settings.items() if name != "depthwise_conv" or k != "groups"},
    }
    make = getattr(layers, name)
    return Row(f"layers.{name}", make, (Spec("normal", x),), given, {}, textbook, NO_BATCH)


ROWS: tuple[Row, ...] = (
    _op(ops.convolution, TWO, "3 3 D O"),
    _op(ops.convolution, TWO, "3 2 4 O", stride=(2, 1), groups=2, padding=[(0, 1), (2, 0)]),
    _op(ops.convolution, TWO, "3 3 1 D", groups=8),
    _op(ops.convolution, TWO, "1 1 D O"),
    _op(ops.convolution, ONE, "3 D O", padding="CAUSAL", dilation=2),
    _op(ops.convolution, ONE, "4 1 16", padding="VALID", groups=8),
    _op(ops.convolution, THREE, "2 2 2 D O", stride=2),
    _op(ops.transposed_convolution, TWO, "3 3 O D", stride=2),
    _op(ops.transposed_convolution, ONE, "4 2 D", stride=3, groups=4, padding="VALID", dilation=2),
    _op(ops.transposed_convolution, THREE, "2 2 2 O D", padding=[(0, 1), (0, 0), (1, 0)]),
    _layer("conv", ops.convolution, TWO, {"features": 8, "kernel_size": 3}),
    _layer(
        "conv",
        ops.convolution,
        ONE,
        {"features": 4, "kernel_size": (3,), "bias": False},
        stride=2,
        padding="CAUSAL",
        dilation=2,
        groups=2,
    ),
    _layer("depthwise_conv", ops.convolution, TWO, {"kernel_size": 3}, groups=8),
    _layer(
        "depthwise_conv",
        ops.convolution,
        ONE,
        {"kernel_size": 2, "multiplier": 2, "bias": False},
        stride=2,
        padding="VALID",
        dilation=2,
        groups=8,
    ),
    _layer(
        "conv_transpose",
        ops.transposed_convolution,
        TWO,
        {"features": 4, "kernel_size": (4, 3)},
        stride=2,
        groups=2,
    ),
    _layer(
        "conv_transpose",
        ops.transposed_convolution,
        ONE,
        {"features": 8, "kernel_size": 3, "bias": False},
        dilation=2,
        padding=[(1, 3)],
    ),
)
