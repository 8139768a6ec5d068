"""The table's rows of normalization, but for layer and batch normalization without a mask."""

import functools
from typing import Any

import jax
from jax import Array

from backhand import layers, ops
from backhand.catalogue.row import Row, Spec
from backhand.visit import Params

X, FLAT, IMAGE = (Spec("normal", axes) for axes in ("B T D", "B D", "B 3 2 D"))
FEATURES = Spec("normal", "D", wide=True)
MASK = Spec("mask", "B T")
EDGES = ({"B": 1}, {"T": 1}, {"B": 0})
NO_FEATURE = ({"B": 1}, {"D": 1}, {"B": 0})


def _textbook(name: str, **settings: Any) -> Any:
    op = getattr(ops, name)

    def textbook(params: Params, x: Array) -> Array:
        y: Array = op.reference(x, *reversed(jax.tree.leaves(params)), **settings)
        return y

    return textbook


def _layer(name: str, x: Spec, **settings: Any) -> Row:
    return Row(
        f"layers.{name}",
        getattr(layers, name),
        (x,),
        settings,
        textbook=_textbook(name, **settings),
        edges=({"B": 1}, {"B": 0}),
    )


def _batch_norm(params: Params, x: Array, training: bool, mask: Array) -> Array:
    y: Array = ops.batch_norm.reference(x, params["scale"], params["offset"], mask)
    return y


def _standardized(params: Params, x: Array) -> Array:
    w = ops.weight_standardization.reference(params["w"])
    y: Array = ops.linear.reference(x, w, params["b"])
    return y


_OWN = (FEATURES, FEATURES)

ROWS: tuple[Row, ...] = (
    Row("ops.batch_norm", ops.batch_norm, (X, *_OWN, MASK), edges=EDGES),
    Row(
        "layers.batch_norm",
        layers.batch_norm,
        (X,),
        {},
        {"training": True, "mask": MASK},
        _batch_norm,
        EDGES,
    ),
    Row("ops.group_norm", ops.group_norm, (IMAGE, *_OWN), {"groups": 2}, edges=({"B": 1},)),
    Row(
        "ops.group_norm",
        ops.group_norm,
        (FLAT, *_OWN),
        {"groups": 4, "eps": 0.1},
        edges=({"B": 1}, {"B": 0}),
    ),
    Row("ops.group_norm", ops.group_norm, (X, *_OWN), {"groups": 1}, edges=EDGES),
    Row("ops.instance_norm", ops.instance_norm, (IMAGE, *_OWN), edges=NO_FEATURE),
    Row("ops.rms_norm", ops.rms_norm, (X, FEATURES), edges=NO_FEATURE),
    Row("ops.rms_norm", ops.rms_norm, (FLAT, FEATURES), {"eps": 0.1}, edges=NO_FEATURE),
    Row(
        "ops.weight_standardization",
        ops.weight_standardization,
        (Spec("normal", "I O", wide=True),),
        edges=({"O": 1}, {"I": 2}),
    ),
    Row(
        "ops.weight_standardization",
        ops.weight_standardization,
        (Spec("normal", "3 2 I O", wide=True),),
        edges=(),
    ),
    _layer("group_norm", IMAGE, groups=2),
    _layer("instance_norm", X),
    _layer("rms_norm", X, eps=0.1),
    Row(
        "layers.standardized",
        functools.partial(layers.standardized, layers.dense(4)),
        (X,),
        textbook=_standardized,
        edges=({"B": 1}, {"B": 0}),
    ),
)
