"""The table's rows of attention and positions."""

from collections.abc import Callable
from typing import Any

from jax import Array

from backhand import layers, ops
from backhand.catalogue.row import Row, Spec
from backhand.visit import Params, PyTree

Q, KEYS, SHARED = (Spec("normal", axes) for axes in ("B T H D", "B S H D", "B S K D"))
BIAS, COMMON = (Spec("normal", axes) for axes in ("B H T S", "1 H T S"))
MASK, LENGTHS = Spec("mask", "B S"), Spec("ids", "B", below="S")
SEGMENTS, KEY_SEGMENTS = Spec("ids", "B T", below="2"), Spec("ids", "B S", below="3")
X, CONTEXT = Spec("normal", "B T D"), Spec("normal", "B S D")
POSITIONS = Spec("ids", "B T", below="V")
EDGES = ({"B": 1}, {"D": 1}, {"T": 1, "S": 1}, {"B": 0})
EVEN = ({"B": 1}, {"D": 2}, {"T": 1}, {"B": 0})
NO_BATCH = ({"T": 1, "S": 1}, {"B": 1}, {"B": 0})


def _attention(*arrays: Spec | None, **settings: Any) -> Row:
    given = (Q, *arrays, *[None] * (7 - len(arrays)))
    return Row("ops.attention", ops.attention, given, settings, edges=EDGES)


def _textbook(
    heads: int,
    key_heads: int | None = None,
    features: int | None = None,
    head_size: int | None = None,
    rotary: float | None = None,
    bias: bool = False,
    **how: Any,
) -> Callable[..., Array]:
    """The layer of references."""

    def linear(params: Params, x: Array, count: int) -> Array:
        y = ops.linear.reference(x, params["w"], params.get("b"))
        return y.reshape(*y.shape[:2], count, y.shape[2] // count)

    def run(params: Params, x: PyTree, **side: Array) -> Array:
        given = x if isinstance(x, dict) else {}
        x, context = x if isinstance(x, tuple) else (given.get("x", x), given.get("context", x))
        q = linear(params["query"], x, heads)
        k, v = (linear(params[name], context, key_heads or heads) for name in ("key", "value"))
        if rotary is not None:
            q, k = (ops.rotary.reference(part, base=rotary) for part in (q, k))
        y = ops.attention.reference(q, k, v, given.get("score_bias"), **side, **how)
        return linear(params["out"], y.reshape(*y.shape[:2], y.shape[2] * y.shape[3]), 1)[:, :, 0]

    return run


def _layer(x: Any, side: Any = (), **settings: Any) -> Row:
    """Multi-head attention of few features, whose parameters fix their number."""
    make, textbook = layers.multi_head_attention, _textbook(**settings)
    name = "layers.multi_head_attention"
    return Row(name, make, (x,), settings, dict(side), textbook, NO_BATCH)


ROWS: tuple[Row, ...] = (
    _attention(Q, Q, causal=True),
    _attention(KEYS, KEYS, scale=0.5),
    _attention(SHARED, SHARED, BIAS, causal=True, soft_cap=2.0),
    _attention(SHARED, SHARED, COMMON, MASK, window=2),
    _attention(SHARED, SHARED, None, None, LENGTHS, causal=True),
    _attention(KEYS, KEYS, None, MASK, None, SEGMENTS, KEY_SEGMENTS, causal=True, window=2),
    Row("ops.rotary", ops.rotary, (Q, None), edges=EVEN),
    Row("ops.rotary", ops.rotary, (Q, POSITIONS), {"interleaved": True}, edges=EVEN),
    Row("ops.sinusoidal", ops.sinusoidal, (X,), edges=EVEN),
    Row("layers.sinusoidal", layers.sinusoidal, (X,), {"base": 100.0}, edges=EVEN),
    Row(
        "layers.positional_embedding",
        layers.positional_embedding,
        (X,),
        {"length": 4},
        textbook=lambda params, x: x + params["table"].astype(x.dtype)[None, : x.shape[1]],
        edges=NO_BATCH,
    ),
    _layer(X, heads=2, causal=True),
    _layer(X, heads=4, key_heads=2, rotary=100.0, bias=True, causal=True, window=2),
    _layer((X, CONTEXT), {"mask": MASK}, heads=4, features=4, head_size=3, soft_cap=2.0),
    _layer(
        {"x": X, "context": CONTEXT, "score_bias": COMMON},
        {"segments": SEGMENTS, "key_segments": KEY_SEGMENTS},
        heads=4,
        key_heads=2,
        scale=1.0,
    ),
)
