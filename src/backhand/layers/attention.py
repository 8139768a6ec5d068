"""Multi-head attention: the layer of a transformer in which tokens meet."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal

from backhand import ops
from backhand.arrays import accumulation_dtype, flag, number, reshape_examples, whole_number
from backhand.layers.dense import linear, linear_uses
from backhand.ops.linear import linear_dx
from backhand.ops.rotary import check_base
from backhand.protocol import Layer, layer, need_floating
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
    scale: float | None = None,
    soft_cap: float | None = None,
    bias: bool = False,
    initializer: Initializer | None = None,
) -> Layer:
    """y = attention(x wq, c wk, c wv) wo, from (B, T, D) to (B, T, features).

    Self-attention of an array x, where c is x; cross-attention of a pair `(x, context)` or a dict
    of `x` and `context` (B, S, C), where c is the context. A dict may also have a `score_bias`
    (B or 1, H or 1, T, S), added to the scores: ALiBi, relative positions, pairs of tokens. It is
    a part of x and no side input, since it has an error: what is learned may lie behind it. The
    error of x has the structure of x. `skip(..., on="x")` adds y to the x of such a dict and passes
    the others on; what `repeat` passes on is there once, its errors added up over the layers. The
    derivation is with `backhand.ops.attention`.

    Parameters: query, key, value and out, each with w (and b), float32, or float64 for float64
    inputs. Uses, each where it is given: `mask` (B, S) and `lengths` (B,), which keys there are;
    `segments` (B, T) and `key_segments` (B, S), of which a query sees its own. x goes through the
    maps also where it is padding: it must be finite there.

    Args:
        heads: H.
        key_heads: heads of keys and values, a divisor of H; H by default.
        features: of y; by default those of x.
        head_size: by default D / H.
        causal: whether a token sees only itself and those before it.
        rotary: the base of rotary positions of queries and keys, 10000.0 as a rule; None for none.
        window: how far a token sees, as `backhand.ops.attention` counts it.
        scale: of the scores; by default 1 / sqrt(head size).
        soft_cap: what scores are kept below.
        bias: whether the four maps have a b; it begins at zero. That of the scores is in x.
        initializer: of each w, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: for heads not divisible by key heads, sizes, a window below 1, a scale or a soft
            cap that is not positive, an odd head size with rotary; when run, for shapes that do not
            agree.
        TypeError: for a rotary, scale or soft cap that is no number; when run, if x, the context or
            the score bias are not floating point.

    Example:
        >>> layer = multi_head_attention(4, key_heads=2, causal=True, rotary=10000.0)
        >>> params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5, 32), "float32"))
        >>> {name: part["w"].shape for name, part in params.items()}
        {'query': (32, 32), 'key': (32, 16), 'value': (32, 16), 'out': (32, 32)}
        >>> apart = jnp.subtract.outer(jnp.arange(5.0), jnp.arange(5.0))
        >>> alibi = -jnp.multiply.outer(2.0 ** -jnp.arange(2.0, 10.0, 2.0), apart)
        >>> layer(params, {"x": jnp.ones((2, 5, 32)), "score_bias": alibi[None]}).shape
        (2, 5, 32)

    References:
        Vaswani et al., "Attention is all you need", 2017.
        Press, Smith and Lewis, "Train short, test long: attention with linear biases enables input
            length extrapolation", 2022.
        Ainslie et al., "GQA: training generalized multi-query transformer models", 2023.
    """
    key_heads = heads if key_heads is None else key_heads
    _check_sizes(heads, key_heads, features, head_size, window)
    _check_positive(scale=scale, soft_cap=soft_cap)
    if rotary is not None:
        check_base(NAME, rotary)
    make = lecun_normal() if initializer is None else initializer
    how: dict[str, Any] = {
        "causal": flag(f"{NAME}'s causal", causal),
        "window": window,
        "scale": scale,
        "soft_cap": soft_cap,
    }

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
        x, context, _ = _parts(x, heads)
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
        x, context, score_bias = _parts(given, heads)
        own = size(x.shape[-1])
        q = _split(linear(params["query"], x), heads, own)
        k = _split(linear(params["key"], context), key_heads, own)
        v = _split(linear(params["value"], context), key_heads, own)
        if rotary is not None:
            q, k = (ops.rotary.forward(part, base=rotary)[0] for part in (q, k))
        y, residuals = ops.attention.forward(
            q, k, v, score_bias, mask, lengths, segments, key_segments, **how
        )
        y = reshape_examples(y, (y.shape[1], heads * own))
        return linear(params["out"], y), (given, residuals, y)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, PyTree]:
        given, attended, y = residuals
        x, context, _ = _parts(given, heads)
        dparams = {"out": linear_uses(params["out"], y, dy)}
        error = linear_dx(dy, params["out"]["w"], y)
        error = _split(error, heads, attended.q.shape[-1])
        dq, dk, dv, dscore_bias, *_ = ops.attention.backward(attended, error, **how)
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
            dx = dx if "context" in given else dx + dcontext
            known = {"x": dx, "context": dcontext, "score_bias": dscore_bias}
            return dparams, {name: known[name] for name in given}
        return dparams, (dx, dcontext) if isinstance(given, tuple) else dx + dcontext

    return layer(NAME, init, forward, rule)


def _parts(x: PyTree, heads: int) -> tuple[Any, Any, Any]:
    """x, its context, which is x itself where there is no other, and its score bias or None."""
    score_bias = None
    if isinstance(x, dict) and "x" in x and x.keys() <= {"x", "context", "score_bias"}:
        score_bias = x.get("score_bias")
        x, context = x["x"], x.get("context", x["x"])
    elif isinstance(x, tuple) and len(x) == 2:
        x, context = x
    elif isinstance(x, dict | tuple | list):
        got = sorted(x) if isinstance(x, dict) else f"{len(x)} parts"
        raise ValueError(
            f"{NAME} needs an array, a pair (x, context) or a dict of 'x' and, where there is "
            f"one, 'context' or 'score_bias', got {got}"
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
    if score_bias is not None:
        _check_score_bias(score_bias, (x.shape[0], heads, x.shape[1], context.shape[1]))
    return x, context, score_bias


def _check_score_bias(score_bias: Any, full: tuple[int, ...]) -> None:
    need_floating(NAME, score_bias, "score_bias")
    shape = score_bias.shape
    fits = len(shape) == 4 and all(own in (1, n) for own, n in zip(shape, full, strict=True))
    if not fits or shape[2:] != full[2:]:
        raise ValueError(
            f"{NAME} needs a score_bias of shape (B, H, T, S) = {full}, where the first two may be "
            f"1, got {shape}"
        )


def _split(x: Array, heads: int, size: int) -> Array:
    """(B, T, H D) as (B, T, H, D)."""
    return reshape_examples(x, (x.shape[1], heads, size))


def _check_sizes(
    heads: int,
    key_heads: int,
    features: int | None,
    head_size: int | None,
    window: int | None,
) -> None:
    sizes = {"heads": heads, "key_heads": key_heads, "features": features, "head_size": head_size}
    for name, value in {**sizes, "window": window}.items():
        if value is not None and whole_number(f"{NAME}'s {name}", value) < 1:
            raise ValueError(f"{NAME} needs {name} of at least 1, got {value}")
    if heads % key_heads:
        raise ValueError(f"{NAME} needs heads divisible by key heads, got {heads} and {key_heads}")


def _check_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not number(f"{NAME}'s {name}", value) > 0:
            raise ValueError(f"{NAME} needs a positive {name}, got {value}")
