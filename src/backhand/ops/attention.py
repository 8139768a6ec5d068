"""Attention: every query takes from the values of the keys that match it.

    s = scale q k^T      s = c tanh(s / c), if capped      s = s + bias      -inf where not seen
    p = softmax(s)       y = p v

A value is blamed by every query that took from it; a score as far as its key's value would have
been better than the mean of what the query took:

    dv = p^T dy      dp = dy v^T      ds = p (dp - sum(p dp))      dbias = ds
    ds <- ds (1 - tanh^2), if capped      dq = scale ds k      dk = scale ds^T q

Nothing as large as p (B, H, T, S) is kept, or ever there beyond two million scores: they are made
block by block, in forward and again in backward, which knows p = exp(s - max s) / l from the two
numbers saved of each row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from backhand.arrays import (
    accumulation_dtype,
    explicit_sharding,
    flag,
    like_primal,
    need_mask,
    number,
)
from backhand.ops.attention_blocks import AT_A_TIME, Head, Scores, backward_head, forward_head
from backhand.ops.attention_heads import at_once, in_turn
from backhand.ops.lengths import check_integers, check_lengths, present
from backhand.ops.settings import integer
from backhand.protocol import Op, need_floating

Q = Float[Array, "B T H D"]
KV = Float[Array, "B S K D"]
Bias = Float[Array, "#B #H T S"]
Segments = Integer[Array, "B T"]
KeySegments = Integer[Array, "B S"]


class Residuals(NamedTuple):
    """What came in, and of every row's scores, which are made again, the largest and 1 / l.

    These are (B, K, T G), as the blocks of a key head read them.
    """

    q: Q
    k: KV
    v: KV
    bias: Bias | None
    mask: Bool[Array, "B S"] | None
    segments: Segments | None
    key_segments: KeySegments | None
    normalizers: tuple[Float[Array, "B K R"], Float[Array, "B K R"]]


def attention_forward(
    q: Q,
    k: KV,
    v: KV,
    bias: Bias | None = None,
    mask: Bool[Array, "B S"] | None = None,
    lengths: Integer[Array, " B"] | None = None,
    segments: Segments | None = None,
    key_segments: KeySegments | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Q, Residuals]:
    """y = softmax(scale q k^T + bias) v, over the keys that each query sees.

    Heads may share keys: query head h reads key head h // (H / K). K = H is multi-head attention,
    K = 1 multi-query, what is between grouped-query. A query that sees no key gives zeros, and no
    error to anything. Memory grows as T + S, both ways; softmax runs in at least float32.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, K, D), K a divisor of H.
        v: values (B, S, K, D).
        bias: added to the scores, (B or 1, H or 1, T, S); it has a gradient.
        mask: which keys there are, (B, S). The others may hold anything, NaN included, in k and v.
        lengths: how many keys there are from the first on, (B,) in [0, S], as a mask otherwise.
            Known ones are checked; inside a jit, more than S are S.
        segments: integers (B, T); a query sees the keys of its own segment.
        key_segments: those of the keys, (B, S); by default `segments`.
        causal: whether query t sees keys up to t only, counted from the first also where S is not
            T, as in `jax.nn.dot_product_attention`.
        window: query t sees keys less than this far from t; causal, the last `window` up to t.
        scale: by default 1 / sqrt(D).
        soft_cap: c; scores are kept within (-c, c) by c tanh(s / c), before the bias is added.

    Returns:
        y (B, T, H, D), in the dtype of q.

    Raises:
        TypeError: if q, k, v or bias are not floating point, mask not boolean, lengths, segments or
            a window not integers, scale or soft cap no number.
        ValueError: for shapes that do not agree, heads not divisible by key heads, lengths beyond
            S, a window below 1 or a soft cap that is not positive.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
        >>> bh.ops.attention(0 * x, x, x, causal=True).ravel().tolist()
        [1.0, 1.5, 2.0]

    References:
        Vaswani et al., "Attention is all you need", 2017.
        Shazeer, "Fast transformer decoding: one write-head is all you need", 2019.
        Dao et al., "FlashAttention", 2022.
    """
    _check(q, k, v, bias, window, scale, soft_cap)
    mask = _keys(k, mask, lengths)
    key_segments = _check_segments(q, k, segments, key_segments)
    how = _scores(q, k, v, bias, causal, window, scale, soft_cap)
    heads = _by_key_head(q, k, v, bias, mask, segments, key_segments)

    def run(how: Scores, each: Callable[..., Any], rows: int) -> Callable[..., Any]:
        def of_head(head: Head) -> tuple[Any, None]:
            o, normalizers = forward_head(head, rows=rows, how=how)
            return (o.astype(q.dtype), normalizers), None

        return lambda heads: each(of_head, heads)[0]

    y, normalizers = _on_this_platform(run, how, q, k, heads, backward=False)
    y = y.reshape(q.shape)
    return y, Residuals(q, k, v, bias, mask, segments, key_segments, normalizers)


def attention_backward(
    residuals: Residuals,
    dy: Q,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Q, KV, KV, Float[Array, "..."] | None, None, None, None, None]:
    q, k, v, bias, mask, segments, key_segments, normalizers = residuals
    how = _scores(q, k, v, bias, causal, window, scale, soft_cap)
    heads = _by_key_head(q, k, v, bias, mask, segments, key_segments)

    def run(how: Scores, each: Callable[..., Any], rows: int) -> Callable[..., Any]:
        def of_head(head: Head, *more: Any) -> tuple[Any, Array | None]:
            dq, dk, dv, dbias = backward_head(head, *more, rows=rows, how=how)
            return (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)), dbias

        return lambda heads, *more: each(of_head, heads, *more)

    more = normalizers, _groups(dy, k.shape[2])
    found, dbias = _on_this_platform(run, how, q, k, heads, *more, backward=True)
    dq, dk, dv = found
    if bias is not None:
        dbias = like_primal(dbias.reshape(bias.shape), bias)
    errors = like_primal(dq.reshape(q.shape), q), like_primal(dk, k), like_primal(dv, v)
    return *errors, dbias, None, None, None, None


def attention_reference(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    dtype, (_, tokens, heads, features), keys = accumulation_dtype(q.dtype), q.shape, k.shape[1]
    wide = [x.astype(accumulation_dtype(x.dtype, dtype)) for x in (q, k, v)]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in wide[1:])
    s = jnp.einsum("bthd,bshd->bhts", wide[0], k) * (features**-0.5 if scale is None else scale)
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    if bias is not None:
        s = s + bias.astype(s.dtype)
    apart = jnp.arange(tokens)[:, None] - jnp.arange(keys)[None, :]
    seen = jnp.ones((1, 1, tokens, keys), bool)
    if causal:
        seen = seen & (apart >= 0)[None, None]
    if window is not None:
        seen = seen & (jnp.abs(apart) < window)[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    if lengths is not None:
        seen = seen & present(lengths, keys)[:, None, None, :]
    if segments is not None:
        others = segments if key_segments is None else key_segments
        own, others = (x.astype(jnp.int32) for x in (segments, others))
        seen = seen & (own[:, :, None] == others[:, None, :])[:, None]
    seen = seen & (s != -jnp.inf)  # a bias masks too
    p = jax.nn.softmax(jnp.where(seen, s, jnp.finfo(s.dtype).min))
    return jnp.einsum("bhts,bshd->bthd", jnp.where(seen, p, 0), v).astype(q.dtype)


attention = Op("attention", attention_forward, attention_backward, attention_reference)

# How it runs --------------------------------------------------------------------------------------


def _scores(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    soft_cap: float | None,
) -> Scores:
    """How scores are made; products read what came in where it has one dtype."""
    dtypes = {x.dtype for x in (q, k, v)}
    wide = accumulation_dtype(*dtypes, *([] if bias is None else [bias.dtype]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    causal = flag("attention's causal", causal)
    return Scores(causal, window, scale, soft_cap, q.dtype if len(dtypes) == 1 else wide, wide)


def _on_this_platform(
    run: Callable[..., Any],
    how: Scores,
    q: Array,
    k: Array,
    head: Head,
    *more: Any,
    backward: bool,
) -> Any:
    """On CPU a few heads at a time, in float32 products; elsewhere, or on explicit axes, all."""
    (batch, tokens, heads, features), (_, keys, key_heads, _) = q.shape, k.shape
    block = SHORT_BLOCK if max(tokens, keys) <= SHORT else BLOCK
    rows = max(block // (heads // key_heads), 16)
    everywhere = run(how, at_once, rows)
    if explicit_sharding(q) is not None:
        return everywhere(head, *more)
    group = heads // key_heads
    most = AT_ONCE if heads > 1 and head.bias is None else AT_ONCE // 2
    few = batch * tokens * heads * keys <= most
    size = max(1, IN_TURN * key_heads // (tokens * heads * keys))
    sliced = how.causal or how.window is not None
    if not sliced:
        whole = WHOLE // 2 if backward else WHOLE
        rows = tokens if few else max(rows, whole * key_heads // (heads * keys))
    each = at_once if few else functools.partial(in_turn, size=size, sliced=sliced)
    simple = heads == key_heads and head.bias is None and how.window is None
    turned = max(tokens, keys) * features <= TURNED if few else backward
    own = how._replace(
        reads=how.gives,
        keys_first=simple and turned,
        q_scaled=not (few and sliced),
        together=together(rows * group * keys) if not sliced else 1 if group == 1 else 2,
    )
    return lax.platform_dependent(head, *more, cpu=run(own, each, rows), default=everywhere)


def together(scores: int) -> int:
    """How many blocks of so many scores, none left out, are taken in a step."""
    return max(1, min(AT_A_TIME, AT_A_TIME * WHOLE // max(1, scores)))


SHORT, SHORT_BLOCK, BLOCK = 256, 64, 128
"""Rows of a block up to, and from, so many tokens."""

WHOLE = 1 << 18
"""Scores that a block on CPU may have where it leaves none out, whatever its rows; half of them on
the way back, whose dv had 1.5 of the error with all (8 heads of 64 features, 1,024 tokens), as it
adds up more products in one go. Loops over blocks that leave scores out take one block in a step,
with grouped heads two (0.75 of the time; with ungrouped ones 0.98, and twice the memory)."""

AT_ONCE, IN_TURN = 1 << 21, 1 << 17
"""Scores up to which all heads are taken at once on CPU, in whole rows unless blocks leave scores
out: 4x256x8x64 took 0.8 of the time that it takes in turn, 32x128x4x16 as much. With one head half
as many (8x512x1x16 took 2.2 times as long at once), and with a bias, whose error is as large again
(4x256x8x64: 1.1). Else, scores of the heads that one step takes."""

TURNED = 1 << 10
"""T D up to which heads taken at once hold their scores with keys first, both ways, so that what
backward makes again is forward's; of heads in turn backward alone does. With grouped heads, a bias
or a window that took 1.2 to 1.4 of the time."""


def _by_key_head(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    segments: Array | None,
    key_segments: Array | None,
) -> Head:
    """The arrays of all key heads: by token, and what is beside with axes (B or 1, K or 1)."""
    key_heads = k.shape[2]
    if bias is not None:
        own = key_heads if bias.shape[1] == q.shape[2] else 1
        bias = bias.reshape(bias.shape[0], own, bias.shape[1] // own, *bias.shape[2:])
    ids = [None if x is None else x.astype(jnp.int32) for x in (segments, key_segments)]
    by_example = [None if x is None else x[:, None] for x in (mask, *ids)]
    if mask is not None:  # 0 p = 0, unless what is not there is NaN
        k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))
    return Head(_groups(q, key_heads), k, v, bias, *by_example)


def _groups(x: Array, key_heads: int) -> Array:
    """(B, T, H, D) as (B, T, K, G, D)."""
    return x.reshape(*x.shape[:2], key_heads, x.shape[2] // key_heads, x.shape[3])


# What it takes ------------------------------------------------------------------------------------


def _check(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    window: int | None,
    scale: float | None,
    soft_cap: float | None,
) -> None:
    for argument, x in {"q": q, "k": k, "v": v, "bias": bias}.items():
        if x is not None:
            need_floating("attention", x, argument)
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            "attention needs q of shape (B, T, H, D) and k and v of shape (B, S, K, D), got "
            f"{q.shape}, {k.shape} and {v.shape}"
        )
    if 0 in (*q.shape[1:], *k.shape[1:]):
        raise ValueError(
            "attention needs at least one token, one key, one head and one feature, got q of "
            f"shape {q.shape} and k of shape {k.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention needs heads divisible by key heads, got {q.shape[2]} heads in q and "
            f"{k.shape[2]} in k"
        )
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias is not None and not (
        bias.ndim == 4
        and bias.shape[2:] == full[2:]
        and all(own in (1, all_) for own, all_ in zip(bias.shape[:2], full[:2], strict=True))
    ):
        raise ValueError(
            f"attention needs a bias of shape {full}, where the first two may be 1, got "
            f"{bias.shape}"
        )
    if window is not None:
        integer("attention", "window", window)
    if scale is not None and not isinstance(scale, jax.Array):  # one under trace has no value yet
        number("attention's scale", scale)
    if soft_cap is not None and not number("attention's soft_cap", soft_cap) > 0:
        raise ValueError(f"attention needs a positive soft_cap, got {soft_cap}")


def _keys(k: Array, mask: Array | None, lengths: Array | None) -> Array | None:
    """Which keys there are, (B, S); None for all."""
    batch, keys = k.shape[:2]
    if mask is not None:
        need_mask("attention", mask)
        if mask.shape != (batch, keys):
            raise ValueError(
                f"attention needs a mask of shape (B, S) = {(batch, keys)}, one entry per key, got "
                f"{mask.shape}; what differs by query goes into a bias, -inf where not seen"
            )
    if lengths is None:
        return mask
    check_lengths("attention", lengths, batch, keys, "the keys that there are")
    there = present(lengths, keys)
    return there if mask is None else mask & there


def _check_segments(
    q: Array, k: Array, segments: Array | None, key_segments: Array | None
) -> Array | None:
    """The segments of the keys."""
    if segments is None:
        if key_segments is not None:
            raise ValueError("attention needs segments beside key_segments, got none")
        return None
    check_integers("attention", "segments", segments, q.shape[:2], "B, T")
    others = segments if key_segments is None else key_segments
    check_integers("attention", "key_segments", others, k.shape[:2], "B, S")
    return others
