"""Attention, both ways, against three forms that an expert writes.

"einsum" has the score matrix written out, grouped where heads share keys; "jax.nn" is
`jax.nn.dot_product_attention`; "blocks" is short of memory: it maps over blocks of queries under
`jax.checkpoint`, so that the scores of one block are there at a time, both ways.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import backhand as bh
from benchmarks.ops.case import Case, normal
from benchmarks.ops.peer import Prepare, torch_op

Seen = Array | np.ndarray | None


def plain(
    q: Array,
    k: Array,
    v: Array,
    *,
    seen: Seen = None,
    bias: Array | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Scores, softmax, values; `seen` and `bias` broadcast to (B, K, G, T, S)."""
    batch, tokens, _, features = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], -1, features)
    s = jnp.einsum("btkgd,bskd->bkgts", grouped, k) * features**-0.5
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    if bias is not None:
        s = s + bias
    if seen is not None:
        s = jnp.where(seen, s, jnp.finfo(s.dtype).min)
    p = jax.nn.softmax(s.astype(jnp.result_type(s.dtype, jnp.float32))).astype(q.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", p, v).reshape(q.shape)


def by_blocks(q: Array, k: Array, v: Array, *, causal: bool, size: int = 128) -> Array:
    """A block of queries at a time, its scores made again on the way back."""
    batch, tokens, heads, features = q.shape
    count = math.ceil(tokens / size)
    padded = jnp.pad(q, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
    blocks = jnp.swapaxes(padded.reshape(batch, count, size, heads, features), 0, 1)

    @jax.checkpoint
    def one(own: tuple[Array, Array]) -> Array:
        block, first = own
        rows = first + jnp.arange(size)[:, None]
        seen = rows >= jnp.arange(k.shape[1]) if causal else None
        return plain(block, k, v, seen=seen)

    y = lax.map(one, (blocks, size * jnp.arange(count)))
    return jnp.swapaxes(y, 0, 1).reshape(padded.shape)[:, :tokens]


def near(tokens: int, keys: int, window: int | None = None, causal: bool = True) -> np.ndarray:
    """Which keys a query sees, by position."""
    apart = np.arange(tokens)[:, None] - np.arange(keys)
    seen = apart >= 0 if causal else np.ones_like(apart, bool)
    return seen if window is None else seen & (np.abs(apart) < window)


def in_torch(
    causal: bool, grouped: bool, mask: Callable[[], np.ndarray | None] = lambda: None
) -> dict[str, Prepare]:
    """PyTorch's scaled_dot_product_attention; a mask replaces `causal`."""

    def attention(functional: Any, q: Any, k: Any, v: Any, seen: Any = None) -> Any:
        run = functools.partial(functional.scaled_dot_product_attention, q, k, v)
        return run(is_causal=causal and seen is None, attn_mask=seen, enable_gqa=grouped)

    def heads_first(*tensors: Any) -> list[Any]:
        return [each.transpose(1, 2).contiguous() for each in tensors]

    def prepare(dy: Any, *arguments: Any) -> Callable[[], Any]:
        import torch

        given = mask()
        seen = None if given is None else torch.from_numpy(given)
        run = functools.partial(attention, seen=seen)
        return torch_op(run, heads_first)(dy, *arguments)

    return {"": prepare}


def case(
    what: str,
    sizes: tuple[int, int, int, int],
    *,
    form: str = "einsum",
    keys: int | None = None,
    key_heads: int | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    padded: bool = False,
    bias: bool = False,
    dtype: str = "float32",
) -> Case:
    """One setting; sizes are B, T, H, D."""
    batch, tokens, heads, features = sizes
    s, kh = keys or tokens, key_heads or heads
    lengths = np.linspace(s // 2, s, batch).astype(np.int32) if padded else None

    def make() -> tuple[Array, ...]:
        q = normal(batch, tokens, heads, features, seed=0, dtype=dtype)
        k, v = (normal(batch, s, kh, features, seed=i, dtype=dtype) for i in (1, 2))
        return (q, k, v, normal(1, heads, tokens, s, seed=3)) if bias else (q, k, v)

    def seen() -> np.ndarray | None:
        """What each query sees, broadcast to (B, H, T, S); None where it sees all."""
        by_place = near(tokens, s, window, causal) if causal or window else None
        if lengths is None:
            return by_place
        there = (np.arange(s) < lengths[:, None])[:, None, None, :]
        return there if by_place is None else there & by_place

    def ours(q: Array, k: Array, v: Array, *more: Array) -> Array:
        own = more[0] if more else None
        return bh.ops.attention(
            q, k, v, own, lengths=lengths, causal=causal, window=window, soft_cap=soft_cap
        )

    def by_einsum(q: Array, k: Array, v: Array, *more: Array) -> Array:
        own, see = (more[0].reshape(1, kh, -1, tokens, s) if more else None), seen()
        see = see if see is None or see.ndim == 2 else see[:, :, None]
        return plain(q, k, v, seen=see, bias=own, soft_cap=soft_cap)

    def by_jax_nn(q: Array, k: Array, v: Array, *more: Array) -> Array:
        wide = None if window is None else (window - 1, 0 if causal else window - 1)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            more[0] if more else None,
            is_causal=causal,
            local_window_size=wide,
            key_value_seq_lengths=lengths,
        )

    forms = {
        "einsum": by_einsum,
        "jax.nn": by_jax_nn,
        "blocks": functools.partial(by_blocks, causal=causal),
    }
    torch = {}
    if form == "einsum" and soft_cap is None and not bias:
        masked = seen if window or padded else lambda: None
        torch = in_torch(causal, kh != heads, masked)
    shape = f"{batch}x{tokens}{'' if keys is None else f'/{keys}'}x{heads}x{features}"
    return Case(
        "attention",
        f"{what}, {shape}, against {form}",
        make,
        ours,
        forms[form],
        torch,
        dtype,
        reference=None if form == "einsum" else by_einsum,
    )


def packed(batch: int, tokens: int, heads: int, features: int, texts: int) -> Case:
    """Several texts in a row of tokens, none of which sees another."""

    def make() -> tuple[Array, ...]:
        q, k, v = (normal(batch, tokens, heads, features, seed=i) for i in range(3))
        ends = np.sort(np.random.default_rng(4).integers(1, tokens, (batch, texts - 1)), -1)
        segments = (np.arange(tokens) >= ends[:, :, None]).sum(1)
        return q, k, v, jnp.asarray(segments, jnp.int32)

    def theirs(q: Array, k: Array, v: Array, segments: Array) -> Array:
        own = (segments[:, :, None] == segments[:, None, :])[:, None, None]
        return plain(q, k, v, seen=own & near(tokens, tokens))

    return Case(
        "attention",
        f"causal, {texts} segments, {batch}x{tokens}x{heads}x{features}, against einsum",
        make,
        lambda q, k, v, segments: bh.ops.attention(q, k, v, segments=segments, causal=True),
        theirs,
    )


def cases() -> Iterator[Case]:
    yield case("full", (64, 16, 4, 16), causal=False)
    yield case("causal", (32, 64, 4, 32))
    yield case("causal", (8, 128, 8, 64))
    for sizes in ((4, 256, 8, 64), (1, 1024, 8, 64), (1, 2048, 8, 64)):
        forms = ("einsum", "jax.nn") if sizes[1] < 1024 else ("einsum", "jax.nn", "blocks")
        for form in forms:
            yield case("causal", sizes, form=form)
    yield case("causal", (1, 1024, 8, 64), dtype="bfloat16")
    yield case("full", (32, 64, 4, 32), causal=False)
    yield case("full", (4, 256, 8, 64), causal=False)
    yield case("full", (8, 512, 1, 16), causal=False)
    for form in ("einsum", "jax.nn", "blocks"):
        yield case("full", (1, 1024, 8, 64), causal=False, form=form)
    yield case("causal, 2 key heads", (4, 256, 8, 64), key_heads=2)
    yield case("causal, 2 key heads", (1, 1024, 8, 64), key_heads=2)
    yield case("causal, 1 key head", (1, 1024, 8, 64), key_heads=1)
    yield case("window of 256", (1, 2048, 8, 64), window=256)
    yield case("window of 256", (1, 8192, 2, 64), window=256)
    yield case("padded", (4, 256, 8, 64), padded=True, causal=False)
    yield case("padded, causal", (4, 512, 8, 64), padded=True)
    yield packed(4, 512, 8, 64, texts=4)
    yield case("cross", (4, 128, 8, 64), keys=512, causal=False)
    yield case("causal, soft cap", (1, 1024, 8, 64), soft_cap=30.0)
    yield case("causal, bias", (4, 256, 8, 64), bias=True)
    yield case("causal, 1000 tokens", (1, 1000, 8, 64))
