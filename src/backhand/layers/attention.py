"""Multi-head attention: the layer of a transformer in which tokens meet."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal

from backhand import ops
from backhand.arrays import accumulation_dtype, reshape_examples
from backhand.layers.dense import linear, linear_uses
from backhand.ops.linear import linear_dx
from backhand.protocol import Layer, layer, need_floating, whole_number
from backhand.visit import Params, PyTree

NAME = "multi_head_attention"


def multi_head_attention(
    heads: int,
    key_heads: int | None = None,
    features: int | None = None,
    head_size: int | None = None,
    *,
    causal: bool = False,
    rotary: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    bias: bool = False,
    initializer: Initializer | None = None,
) -> Layer:
    """y = attention(x wq, c wk, c wv) wo, from (B, T, D) to (B, T, features).

    Self-attention of an array x, where c is x; cross-attention of a pair `(x, context)` or a dict
    of `x` and `context` (B, S, C), where c is the context. The error of x then has its structure.
    `skip(..., on="x")` adds y to the x of such a dict and passes the context on. The derivation is
    with `backhand.ops.attention`.

    Parameters: query, key, value and out, each with w (and b), float32, or float64 for float64
    inputs. Uses, each where it is given: `mask` (B, S) and `lengths` (B,), which keys there are;
    `segments` (B, T) and `key_segments` (B, S), of which a query sees its own.

    Args:
        heads: H.
        key_heads: heads of keys and values, a divisor of H; H by default.
        features: of y; by default those of x.
        head_size: by default D / H.
        causal: whether a token sees only itself and those before it.
        rotary: the base of rotary positions of queries and keys, 10000.0 as a rule; None for none.
        window: how far a token sees, as `backhand.ops.attention` counts it.
        soft_cap: what scores are kept below.
        bias: whether the four maps have a b; it begins at zero.
        initializer: of each w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: for heads not divisible by key heads, sizes, a window below 1, a soft cap that
            is not positive, an odd head size with rotary; when run, for shapes that do not agree.
        TypeError: when run, if x or the context are not floating point.

    Example:
        >>> layer = multi_head_attention(4, key_heads=2, causal=True, rotary=10000.0)
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5, 32), "float32"))
        >>> {name: part["w"].shape for name, part in params.items()}
        {'query': (32, 32), 'key': (32, 16), 'value': (32, 16), 'out': (32, 32)}

    References:
        Vaswani et al., "Attention is all you need", 2017.
        Ainslie et al., "GQA: training generalized multi-query transformer models", 2023.
    """
    key_heads = heads if key_heads is None else key_heads
    _check_sizes(heads, key_heads, features, head_size, window, soft_cap)
    make = lecun_normal() if initializer is None else initializer
    how: dict[str, Any] = {"causal": causal, "window": window, "soft_cap": soft_cap}

    def size(width: int) -> int:
        """The features of a head."""
        if head_size is None and width % heads:
            raise ValueError(
                f"{NAME} needs features divisible by its {heads} heads, got {width}; or pass "
                "head_size"
            )
        found = width // heads if head_size is None else head_size
        if rotary is not None and found % 2:
            raise ValueError(f"{NAME} needs an even head size for rotary positions, got {found}")
        return found

    def init(key: Array, x: PyTree) -> Params:
        x, context = _parts(x)
        wide, own = accumulation_dtype(x.dtype), size(x.shape[-1])
        shapes = {
            "query": (x.shape[-1], heads * own),
            "key": (context.shape[-1], key_heads * own),
            "value": (context.shape[-1], key_heads * own),
            "out": (heads * own, x.shape[-1] if features is None else features),
        }
        keys = jax.random.split(key, 4)
        params: dict[str, dict[str, Array]] = {
            name: {"w": make(key, shape, wide)}
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        if bias:
            for part in params.values():
                part["b"] = jnp.zeros(part["w"].shape[1], wide)
        return params

    def forward(
        params: Params,
        x: PyTree,
        *,
        mask: Array | None = None,
        lengths: Array | None = None,
        segments: Array | None = None,
        key_segments: Array | None = None,
    ) -> tuple[Array, PyTree]:
        given = x
        x, context = _parts(given)
        own = size(x.shape[-1])
        q = _split(linear(params["query"], x), heads, own)
        k = _split(linear(params["key"], context), key_heads, own)
        v = _split(linear(params["value"], context), key_heads, own)
        if rotary is not None:
            q, k = (ops.rotary.forward(part, base=rotary)[0] for part in (q, k))
        y, residuals = ops.attention.forward(
            q, k, v, None, mask, lengths, segments, key_segments, **how
        )
        y = reshape_examples(y, (y.shape[1], heads * own))
        return linear(params["out"], y), (given, residuals, y)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, PyTree]:
        given, attended, y = residuals
        x, context = _parts(given)
        dparams = {"out": linear_uses(params["out"], y, dy)}
        error = linear_dx(dy, params["out"]["w"], y)
        error = _split(error, heads, attended.q.shape[-1])
        dq, dk, dv, *_ = ops.attention.backward(attended, error, **how)
        if rotary is not None:
            dq, _ = ops.rotary.backward((attended.q, None), dq, base=rotary)
            dk, _ = ops.rotary.backward((attended.k, None), dk, base=rotary)
        errors = {}
        for name, read, d in (("query", x, dq), ("key", context, dk), ("value", context, dv)):
            d = reshape_examples(d, (d.shape[1], d.shape[2] * d.shape[3]))
            dparams[name] = linear_uses(params[name], read, d)
            errors[name] = linear_dx(d, params[name]["w"], read)
        dx, dcontext = errors["query"], errors["key"] + errors["value"]
        if isinstance(given, dict):
            return dparams, {"x": dx, "context": dcontext}
        return dparams, (dx, dcontext) if isinstance(given, tuple) else dx + dcontext

    return layer(NAME, init, forward, rule)


def _parts(x: PyTree) -> tuple[Any, Any]:
    """x and its context, which is x itself where there is no other."""
    if isinstance(x, dict) and x.keys() == {"x", "context"}:
        x, context = x["x"], x["context"]
    elif isinstance(x, tuple) and len(x) == 2:
        x, context = x
    elif isinstance(x, dict | tuple | list):
        got = sorted(x) if isinstance(x, dict) else f"{len(x)} parts"
        raise ValueError(
            f"{NAME} needs an array, a pair (x, context) or a dict of 'x' and 'context', got {got}"
        )
    else:
        context = x
    for part in (x, context):
        need_floating(NAME, part)
        if len(part.shape) != 3 or part.shape[0] != x.shape[0]:
            raise ValueError(
                f"{NAME} needs x of shape (B, T, D) and a context of shape (B, S, C), got "
                f"{x.shape} and {context.shape}"
            )
    return x, context


def _split(x: Array, heads: int, size: int) -> Array:
    """(B, T, H D) as (B, T, H, D)."""
    return reshape_examples(x, (x.shape[1], heads, size))


def _check_sizes(
    heads: int,
    key_heads: int,
    features: int | None,
    head_size: int | None,
    window: int | None,
    soft_cap: float | None,
) -> None:
    sizes = {"heads": heads, "key_heads": key_heads, "features": features, "head_size": head_size}
    for name, value in {**sizes, "window": window}.items():
        if value is not None and whole_number(f"{NAME}'s {name}", value) < 1:
            raise ValueError(f"{NAME} needs {name} of at least 1, got {value}")
    if heads % key_heads:
        raise ValueError(f"{NAME} needs heads divisible by key heads, got {heads} and {key_heads}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{NAME} needs a positive soft_cap, got {soft_cap}")
