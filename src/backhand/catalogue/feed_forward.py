"""The table's rows of feed-forward blocks, gated units and the mixture of experts."""

from collections.abc import Callable
from typing import Any

from jax import Array

from backhand import layers, ops
from backhand.catalogue.row import Row, Spec
from backhand.visit import Params, PyTree

X = Spec("normal", "B T D")
MASK = Spec("mask", "B T")
SMALL = ({"B": 1}, {"T": 1}, {"B": 0})
SPARE = ({"B": 1}, {"B": 0})


def _weight(axes: str) -> Spec:
    return Spec("normal", axes, wide=True)


ROUTER, W_IN, W_OUT = _weight("D H"), _weight("H D U"), _weight("H U D")


def _mixture(gate: Spec | None, mask: Spec | None, **settings: Any) -> Row:
    inputs = (X, ROUTER, W_IN, W_OUT, gate, mask)
    return Row("ops.mixture_of_experts", ops.mixture_of_experts, inputs, settings, edges=SMALL)


def _experts(**settings: Any) -> Callable[..., PyTree]:
    """The layer of experts as its op's reference."""

    def textbook(params: Params, x: Array, mask: Array | None = None) -> PyTree:
        own = (params.get(name) for name in ("router", "w_in", "w_out", "w_gate"))
        return ops.mixture_of_experts.reference(x, *own, mask, **settings)

    return textbook


def _mlp(activation: str) -> Callable[..., Array]:
    act = getattr(ops, activation)

    def textbook(params: Params, x: Array) -> Array:
        hidden, out = ((part["w"], part.get("b")) for part in (params["hidden"], params["out"]))
        return ops.linear.reference(act.reference(ops.linear.reference(x, *hidden)), *out)

    return textbook


def _gated_mlp(op: Any) -> Callable[..., Array]:
    def textbook(params: Params, x: Array) -> Array:
        gate, value = (ops.linear.reference(x, params[name]) for name in ("w_gate", "w_value"))
        return ops.linear.reference(op.reference(gate, value), params["w_out"])

    return textbook


ROWS: tuple[Row, ...] = (
    Row("ops.gated", ops.gated, (X, X), {"activation": "tanh"}),
    Row("ops.gated", ops.gated, (X, X), {"activation": ops.elu.bind(alpha=0.5)}),
    Row("ops.glu", ops.glu, (X, X)),
    Row("ops.swiglu", ops.swiglu, (X, X)),
    Row("ops.geglu", ops.geglu, (X, X)),
    Row("ops.geglu", ops.geglu, (X, X), {"approximate": True}),
    Row("layers.mlp", layers.mlp, (X,), {"hidden": 4}, textbook=_mlp("gelu")),
    Row(
        "layers.mlp",
        layers.mlp,
        (X,),
        {"hidden": 8, "features": 4, "activation": "relu", "bias": False},
        textbook=_mlp("relu"),
    ),
    Row("layers.gated_mlp", layers.gated_mlp, (X,), {"hidden": 4}, textbook=_gated_mlp(ops.swiglu)),
    Row(
        "layers.gated_mlp",
        layers.gated_mlp,
        (X,),
        {"hidden": 8, "features": 4, "activation": "sigmoid"},
        textbook=_gated_mlp(ops.glu),
    ),
    _mixture(None, None),
    _mixture(W_IN, MASK, top_k=3, activation="silu"),
    _mixture(None, MASK, top_k=1, capacity_factor=0.5),
    _mixture(W_IN, None, capacity_factor=None),
    Row(
        "layers.mixture_of_experts",
        layers.mixture_of_experts,
        (X,),
        {"experts": 4, "hidden": 4},
        textbook=_experts(),
        edges=SPARE,
    ),
    Row(
        "layers.mixture_of_experts",
        layers.mixture_of_experts,
        (X,),
        {"experts": 4, "hidden": 8, "top_k": 1, "capacity_factor": 0.7, "gated": True},
        {"mask": MASK},
        _experts(top_k=1, capacity_factor=0.7),
        SPARE,
    ),
)
