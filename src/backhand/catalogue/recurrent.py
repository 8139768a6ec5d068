"""Rows of the recurrent ops and layers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand import layers, ops
from backhand.catalogue.row import Row, Spec
from backhand.protocol import Op
from backhand.visit import Params, PyTree

X = Spec("normal", "B T D")
STATE = Spec("normal", "B U")
WIDE = Spec("normal", "B D")
EDGES = ({"B": 1}, {"B": 0})
LENGTHS = Spec("ids", "B", below="4")  # from 0 to T = 3


def _weight(axes: str) -> Spec:
    return Spec("normal", axes, wide=True)


def _textbook(
    op: Op, names: str, return_state: bool = False, **settings: Any
) -> Callable[..., PyTree]:
    """A recurrent layer as its op's reference."""

    def textbook(params: Params, x: PyTree, lengths: Array | None = None) -> PyTree:
        x, state = (x["x"], x["state"]) if isinstance(x, dict) else (x, None)
        arrays = (params[name] for name in names.split())
        y, last = op.reference(x, *arrays, state, lengths, **settings)
        return (y, last) if return_state else y

    return textbook


def _layer(
    name: str,
    op: Op,
    x: Any,
    side: Mapping[str, Spec],
    names: str = "wx wh b",
    **settings: Any,
) -> Row:
    make = getattr(layers, name)
    textbook = _textbook(op, names, **settings)
    return Row(f"layers.{name}", make, (x,), {"features": 8, **settings}, side, textbook, EDGES)


def _both_ways(params: Params, x: Array, lengths: Array) -> Array:
    ahead, back = (
        _textbook(ops.gru, "wx wh b bn", reverse=reverse)(params[name], x, lengths)
        for name, reverse in (("ahead", False), ("back", True))
    )
    return jnp.concatenate([ahead, back], -1)


def _two_layers(params: Params, x: PyTree, lengths: Array) -> PyTree:
    y, states = x["x"], []
    for own, state in zip(params, x["state"], strict=True):
        textbook = _textbook(ops.gru, "wx wh b bn", return_state=True)
        y, last = textbook(own, {"x": y, "state": state}, lengths)
        states.append(last)
    return y, tuple(states)


def _diagonal_ssm(params: Params, x: Array) -> Array:
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    a = jax.nn.sigmoid(params["decay"])
    u = jnp.sqrt(1 - a * a)[None, None] * (x @ params["w_in"])
    h = ops.linear_recurrence.reference(jnp.broadcast_to(a[None, None], u.shape), u)
    return h @ params["w_out"] + x * params["skip"][None, None]


_LSTM = (X, _weight("D 4U"), _weight("U 4U"), _weight("4U"))
_GRU = (X, _weight("D 3U"), _weight("U 3U"), _weight("3U"), _weight("U"))
_ELMAN = (X, _weight("D U"), _weight("U U"), _weight("U"))

ROWS: tuple[Row, ...] = (
    Row("ops.lstm", ops.lstm, (*_LSTM, None, None)),
    Row("ops.lstm", ops.lstm, (*_LSTM, (STATE, STATE), LENGTHS)),
    Row("ops.lstm", ops.lstm, (*_LSTM, (STATE, STATE), LENGTHS), {"reverse": True}),
    Row("ops.gru", ops.gru, (*_GRU, None, None)),
    Row("ops.gru", ops.gru, (*_GRU, STATE, LENGTHS), {"reverse": True}),
    Row("ops.elman", ops.elman, (*_ELMAN, None, None)),
    Row("ops.elman", ops.elman, (*_ELMAN, STATE, LENGTHS), {"activation": "relu"}),
    Row("ops.elman", ops.elman, (*_ELMAN, STATE, LENGTHS), {"reverse": True}),
    _layer("lstm", ops.lstm, X, {}),
    _layer(
        "lstm",
        ops.lstm,
        {"x": X, "state": (WIDE, WIDE)},
        {"lengths": LENGTHS},
        reverse=True,
        return_state=True,
    ),
    _layer("gru", ops.gru, X, {"lengths": LENGTHS}, "wx wh b bn"),
    _layer("gru", ops.gru, {"x": X, "state": WIDE}, {}, "wx wh b bn", return_state=True),
    _layer("rnn", ops.elman, X, {"lengths": LENGTHS}, activation="relu"),
    _layer("rnn", ops.elman, {"x": X, "state": WIDE}, {}, reverse=True),
    Row(
        "layers.bidirectional",
        functools.partial(layers.bidirectional, layers.gru),
        (X,),
        {"features": 4},
        {"lengths": LENGTHS},
        _both_ways,
        EDGES,
    ),
    Row(
        "layers.stacked",
        functools.partial(layers.stacked, layers.gru),
        ({"x": X, "state": (WIDE, WIDE)},),
        {"features": 8, "layers": 2, "return_state": True},
        {"lengths": LENGTHS},
        _two_layers,
        EDGES,
    ),
    Row("ops.linear_recurrence", ops.linear_recurrence, (X, X, None)),
    Row(
        "ops.linear_recurrence",
        ops.linear_recurrence,
        (X, X, Spec("normal", "B D")),
        {"reverse": True},
    ),
    Row(
        "layers.diagonal_ssm",
        layers.diagonal_ssm,
        (X,),
        {"states": 4},
        textbook=_diagonal_ssm,
    ),
)
