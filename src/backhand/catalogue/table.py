"""The table: every op, loss, layer and combinator, each with a few settings.

To add one is to add its row.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand import combinators, layers, losses, ops
from backhand.arrays import upcast
from backhand.catalogue import (
    attention,
    convolution,
    feed_forward,
    normalization,
    pooling,
    recurrent,
)
from backhand.catalogue import losses as loss_rows
from backhand.catalogue.row import Row, Spec, SpecTree
from backhand.ops.normalization import affine
from backhand.protocol import Layer, layer
from backhand.visit import Params, PyTree

# What rows are made of ----------------------------------------------------------------------------

X = Spec("normal", "B T D")
IDS = Spec("ids", "B T", below="V")
KEY = Spec("key")
FEATURES = Spec("normal", "D", wide=True)
WEIGHT = Spec("normal", "I O", wide=True)
NUMBERS = Spec("normal", "B T V")
SHARES = Spec("shares", "B T V")
BATCH_ONLY = ({"B": 1}, {"B": 0})
NO_BATCH = ({"B": 0},)


def _weights(axes: str) -> Spec:
    """Weights per example or per position, some of them zero."""
    return Spec("weights", axes, wide=True)


def _parameterless(name: str, **settings: Any) -> tuple[Row, Row]:
    """An op of one array, and the layer that is nothing else."""
    op = getattr(ops, name)
    return (
        Row(f"ops.{name}", op, (X,), settings),
        Row(
            f"layers.{name}",
            getattr(layers, name),
            (X,),
            settings,
            textbook=lambda params, x: op.reference(x, **settings),
        ),
    )


def _loss(name: str, targets: Spec, weights: Spec | None, **settings: Any) -> Row:
    """A loss of predictions (B, T, V)."""
    return Row(
        f"losses.{name}",
        getattr(losses, name),
        (NUMBERS, targets, weights),
        settings,
        edges=({"B": 1}, {"V": 1}, {"B": 0}),
    )


def _around(
    name: str,
    *,
    ids: bool = False,
    x: SpecTree = None,
    side: Mapping[str, Any] | None = None,
    textbook: Callable[..., PyTree] | None = None,
    without: Mapping[str, str] = MappingProxyType({}),
    **settings: Any,
) -> Row:
    """A combinator of layers that fix the number of features."""
    make_layer, x = getattr(combinators, name), x or (IDS if ids else X)
    return Row(
        f"combinators.{name}", make_layer, (x,), settings, side or {}, textbook, NO_BATCH, without
    )


def _dense(params: Params, x: Array) -> Array:
    return ops.linear.reference(x, params["w"], params.get("b"))


def _mlp(params: Params, x: Array) -> Array:
    return _dense(params["out"], jnp.tanh(_dense(params["hidden"], x)))


def _embedding(params: Params, ids: Array) -> Array:
    return jnp.take(params["table"], ids, axis=0)


def _unembedding(params: Params, x: Array) -> Array:
    return jnp.einsum("...d,vd->...v", x, params["table"].astype(x.dtype))


def _layer_norm(params: Params, x: Array, eps: float = 1e-5) -> Array:
    return ops.layer_norm.reference(x, params["scale"], params["offset"], eps=eps)


def _batch_norm(params: Params, x: Array, training: bool) -> Array:
    if training:
        return ops.batch_norm.reference(x, params["scale"], params["offset"])
    wide = upcast(x)
    params = jax.tree.map(lambda leaf: leaf.astype(wide.dtype), params)
    running = lax.stop_gradient(params["running"])
    factor = params["scale"] / jnp.sqrt(running.var + 1e-5)
    return affine(wide, factor, params["offset"] - running.mean * factor).astype(x.dtype)


def _dropout(params: Params, x: Array, training: bool, key: Array | None = None) -> Array:
    if key is None or not training:
        return x
    return ops.dropout.reference(x, key, rate=0.25)


def _repeated(depth: int, inner: Layer) -> Callable[..., PyTree]:
    """`repeat` as the loop that it stands for."""

    def textbook(params: Params, x: PyTree, **side: Any) -> PyTree:
        for index in range(depth):
            x = inner(jax.tree.map(operator.itemgetter(index), params), x, **side)
        return x

    return textbook


def _reversed_halves(depth: int) -> Callable[..., Array]:
    """`reversible` as the loop that it stands for."""

    def textbook(params: Params, x: Array) -> Array:
        x1, x2 = jnp.split(x, 2, axis=-1)
        for index in range(depth):
            own = jax.tree.map(operator.itemgetter(index), params)
            x1 = x1 + _HALF(own["f"], x2)
            x2 = x2 + _GATED(own["g"], x1)
        return jnp.concatenate([x1, x2], -1)

    return textbook


_MLP: dict[str, Any] = {"hidden": layers.dense(4), "act": layers.tanh(), "out": layers.dense(8)}
_BLOCK = combinators.chain(layers.layer_norm(), layers.dense(8), layers.gelu())
_HALF = combinators.chain(layers.layer_norm(), layers.dense(4), layers.tanh())
_GATED = layers.gated_mlp(4)
_NOISY = combinators.chain(layers.dense(4), layers.dropout(0.25))
_EXPERTS = combinators.chain(layers.layer_norm(), layers.mixture_of_experts(4, 4))
_RANDOM = combinators.chain(layers.dropout(0.25), layers.dense(8), layers.dropout(0.25))
_NORMED = combinators.chain(layers.dense(4), layers.batch_norm(), layers.dense(8))
_TIED = combinators.chain(
    tokens=layers.embedding(12, 8), body=combinators.skip(_BLOCK), logits=layers.unembedding(12)
)
_CROSS = combinators.chain(
    combinators.on("x", layers.rms_norm()), layers.multi_head_attention(2, bias=True)
)
_DECODER = combinators.chain(
    combinators.on("x", combinators.skip(_BLOCK)), combinators.skip(_CROSS, on="x")
)
_MASKED = layer(
    "masked",
    lambda key, x: (),
    lambda params, x, *, mask: (jnp.where(mask[..., None], x, 0), ()),
    lambda params, residuals, dy, *, mask: ((), jnp.where(mask[..., None], dy, 0)),
)
_BOTH = {"x": X, "context": Spec("normal", "B S D")}
_SCAN = {"split parameters": "a scan hands on what it takes, split over devices the same way"}
_RANDOMLY = {"training": True, "key": KEY}

# The table ----------------------------------------------------------------------------------------

ROWS: tuple[Row, ...] = (
    *_parameterless("relu"),
    *_parameterless("leaky_relu", negative_slope=0.1),
    *_parameterless("sigmoid"),
    *_parameterless("tanh"),
    *_parameterless("gelu"),
    *_parameterless("gelu", approximate=True),
    *_parameterless("silu"),
    *_parameterless("softplus"),
    *_parameterless("elu", alpha=0.5),
    *_parameterless("softmax"),
    *_parameterless("softmax", axis=1),
    *_parameterless("flatten"),
    *_parameterless("cast", dtype="bfloat16"),
    *_parameterless("cast", dtype="float32"),
    Row("ops.reshape", ops.reshape, (X,), {"shape": (2, -1)}, edges=BATCH_ONLY),
    Row("layers.reshape", functools.partial(layers.reshape, 12, 2), (X,), edges=BATCH_ONLY),
    Row("ops.dropout", ops.dropout, (X, KEY), {"rate": 0.25}),
    Row("layers.dropout", layers.dropout, (X,), {"rate": 0.25}, _RANDOMLY, _dropout),
    Row("layers.dropout", layers.dropout, (X,), {"rate": 0.25}, {"training": False}, _dropout),
    Row(
        "ops.linear", ops.linear, (Spec("normal", "B T I"), WEIGHT, Spec("normal", "O", wide=True))
    ),
    Row("ops.linear", ops.linear, (Spec("normal", "B I"), WEIGHT, None)),
    Row("layers.dense", layers.dense, (X,), {"features": 4}, textbook=_dense),
    Row("layers.dense", layers.dense, (X,), {"features": 8, "bias": False}, textbook=_dense),
    Row("ops.embedding", ops.embedding, (Spec("normal", "V D", wide=True), IDS)),
    Row(
        "layers.embedding",
        layers.embedding,
        (IDS,),
        {"vocabulary": 12, "features": 8},
        textbook=_embedding,
        edges=BATCH_ONLY,
    ),
    Row("layers.unembedding", layers.unembedding, (X,), {"vocabulary": 12}, textbook=_unembedding),
    Row("ops.layer_norm", ops.layer_norm, (X, FEATURES, FEATURES)),
    Row("ops.layer_norm", ops.layer_norm, (X, FEATURES, FEATURES), {"eps": 0.1}),
    Row("layers.layer_norm", layers.layer_norm, (X,), textbook=_layer_norm),
    Row("ops.batch_norm", ops.batch_norm, (X, FEATURES, FEATURES, None)),
    Row(
        "ops.batch_norm",
        ops.batch_norm,
        (Spec("normal", "B D"), FEATURES, FEATURES, None),
        {"eps": 0.1},
    ),
    Row("layers.batch_norm", layers.batch_norm, (X,), {}, {"training": True}, _batch_norm),
    Row("layers.batch_norm", layers.batch_norm, (X,), {}, {"training": False}, _batch_norm),
    _loss("mean_squared_error", NUMBERS, None),
    _loss("mean_squared_error", NUMBERS, _weights("B")),
    _loss("mean_squared_error", Spec("ids", "B T V", below="V"), Spec("mask", "B T")),
    _loss("mean_absolute_error", NUMBERS, None),
    _loss("mean_absolute_error", NUMBERS, _weights("B T V")),
    _loss("huber", NUMBERS, None),
    _loss("huber", NUMBERS, _weights("B T"), delta=0.5),
    _loss("sigmoid_cross_entropy", SHARES, None),
    _loss("sigmoid_cross_entropy", Spec("mask", "B T V"), _weights("B")),
    _loss("sigmoid_cross_entropy", SHARES, _weights("B T V"), label_smoothing=0.1),
    _loss("softmax_cross_entropy", IDS, None),
    _loss("softmax_cross_entropy", IDS, Spec("mask", "B T")),
    _loss("softmax_cross_entropy", Spec("probabilities", "B T V"), _weights("B T")),
    _loss("softmax_cross_entropy", IDS, _weights("B"), label_smoothing=0.1),
    _around("chain", textbook=_mlp, **_MLP),
    _around("chain", side=_RANDOMLY, drop=layers.dropout(0.25), norm=layers.batch_norm()),
    _around(
        "parallel",
        textbook=lambda params, x: {name: part(params[name], x) for name, part in _MLP.items()},
        **_MLP,
    ),
    _around("parallel", ids=True, first=layers.embedding(12, 8), second=layers.embedding(12, 4)),
    _around(
        "add",
        textbook=lambda params, x: _dense(params["one"], x) + _dense(params["other"], x),
        one=layers.dense(4),
        other=layers.dense(4),
    ),
    _around("skip", textbook=lambda params, x: x + _BLOCK(params, x), inner=_BLOCK),
    _around(
        "skip",
        x=_BOTH,
        side={"mask": Spec("mask", "B S")},
        textbook=lambda params, x, mask: {**x, "x": x["x"] + _CROSS(params, x, mask=mask)},
        inner=_CROSS,
        on="x",
    ),
    _around(
        "on",
        x=_BOTH,
        textbook=lambda params, x: {**x, "x": _BLOCK(params, x["x"])},
        part="x",
        inner=_BLOCK,
    ),
    _around(
        "on",
        x=(X, IDS),
        textbook=lambda params, x: (x[0], _embedding(params, x[1])),
        part=1,
        inner=layers.embedding(12, 8),
    ),
    _around("pick", x=_BOTH, textbook=lambda params, x: x["context"], part="context"),
    _around(
        "repeat",
        x=_BOTH,
        inner=_DECODER,
        depth=2,
        textbook=_repeated(2, _DECODER),
        without=_SCAN,
    ),
    _around(
        "repeat",
        inner=combinators.skip(_BLOCK),
        depth=3,
        textbook=_repeated(3, combinators.skip(_BLOCK)),
        without=_SCAN,
    ),
    _around("repeat", side=_RANDOMLY, inner=_RANDOM, depth=2, without=_SCAN),
    _around("checkpoint", textbook=lambda params, x: _BLOCK(params, x), inner=_BLOCK),
    _around("checkpoint", side=_RANDOMLY, inner=_RANDOM),
    _around("freeze", inner=_BLOCK),
    _around("freeze", side={"training": True}, inner=_NORMED),
    _around("reversible", f=_HALF, g=_GATED, depth=2, textbook=_reversed_halves(2), without=_SCAN),
    _around("reversible", side=_RANDOMLY, f=_NOISY, g=_HALF, depth=2, without=_SCAN),
    _around("skip", inner=_EXPERTS),
    _around("tally", inner=combinators.skip(_EXPERTS)),
    _around(
        "share",
        textbook=lambda params, x: _BLOCK(params["a"], _BLOCK(params["a"], x)),
        inner=combinators.chain(a=_BLOCK, b=_BLOCK),
        ties={"b": "a"},
    ),
    _around("share", ids=True, inner=_TIED, ties={"logits/table": "tokens/table"}),
    _around("rename", side={"known": Spec("mask", "B T")}, inner=_MASKED, mask="known"),
    *attention.ROWS,
    *convolution.ROWS,
    *feed_forward.ROWS,
    *loss_rows.ROWS,
    *normalization.ROWS,
    *pooling.ROWS,
    *recurrent.ROWS,
)
