"""Attention of one key head, by blocks of rows, without more scores than a block's at a time.

A key head serves G query heads (G = 1 without grouping). Its queries (T, G, D) are T G rows, and a
block of R tokens is R G consecutive rows, each set against the keys that some row of it may see:

    s = scale q k^T, capped, + bias, -inf where not seen         (R G, n)
    o = e v / l      with e = exp(s - max s), l = sum e

The way back computes s again and has p = exp(s - max s) / l at once, as both are saved. One number,
max s + log l, would do, but it is rounded as the scores are large: f32 errors were five times
autodiff's.

    dv += p^T do     dp = do v^T     ds = p (dp - sum(p dp))
    dq  = ds k       dk += ds^T q    dbias = ds

A block has all keys of its rows at hand, so that sum(p dp) is taken as it stands. As sum(o do) it
would need o among the residuals, took up to 15% longer, and is rounding where a row sees one key
and ds is 0. The rows of a group add up in dk and dv by themselves. A row that sees no key has
e = 0 and o = 0; 0 in place of 1 / l makes p = 0 on the way back.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from backhand.arrays import varying

UNROLLED = 16
"""Blocks, or loops over blocks, that are written out one after the other, each with its own number
of keys: of the scores above the diagonal at most 1 / 16 is computed."""

MOVING, AT_A_TIME = 0.75, 4
"""Of the scores of blocks that are written out, what one loop with moving keys must be content
with, as its blocks are slower; and how many of these it takes in a step, which two cores share. One
head of 64 features and a causal window of 256, both ways: 35 : 68 ms at 8,192 tokens (0.5 of the
scores), 8.5 : 7.0 ms at 2,048 (1.07)."""


class Head(NamedTuple):
    """The arrays of one key head; the last four may be None."""

    q: Any  # (T, G, D)
    k: Any  # (S, D)
    v: Any  # (S, D)
    bias: Any  # (G or 1, T, S)
    mask: Any  # (S,)
    segments: Any  # (T,)
    key_segments: Any  # (S,)


class Scores(NamedTuple):
    """How scores are made of queries and keys, what products read, and what they give."""

    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None
    reads: DTypeLike
    gives: DTypeLike


class Span(NamedTuple):
    """`blocks` blocks of `rows` tokens each from `start` on, against keys from `lo` to `hi`.

    A block meets `width` of these: all, or as many as its window has, from `back` keys before its
    first token on.
    """

    start: int
    rows: int
    blocks: int
    lo: int
    hi: int
    width: int
    back: int = 0

    @property
    def last(self) -> int:
        """The last token."""
        return self.start + self.rows * self.blocks - 1

    @property
    def moves(self) -> bool:
        """Whether the keys move on with the blocks."""
        return self.width < self.hi - self.lo

    @property
    def scores(self) -> int:
        """How many its blocks make."""
        return self.rows * self.blocks * self.width

    def first(self, start: Array | int) -> Array | int:
        """The first key of the block that begins at `start`."""
        return jnp.clip(start - self.back, self.lo, self.hi - self.width) if self.moves else self.lo


def spans(tokens: int, keys: int, rows: int, how: Scores) -> list[Span]:
    """The blocks of all tokens; a shorter one ends them.

    Those with the same keys are together, or all of them with moving keys where that makes far
    fewer scores: with a window these grow as T x window.
    """
    blocks, rest = divmod(tokens, rows)
    local = how.causal or how.window is not None
    each = max(1, -(-blocks // UNROLLED) if local else blocks)
    found = [
        _span(first * rows, rows, min(each, blocks - first), keys, how)
        for first in range(0, blocks, each)
    ]
    if how.window is not None and blocks > 1:
        back = how.window - 1
        width = min(keys, rows + back * (1 if how.causal else 2))
        moving = Span(0, rows, blocks, 0, keys, width, back)
        if moving.moves and moving.scores <= MOVING * sum(span.scores for span in found):
            found = [moving]
    return found + ([_span(blocks * rows, rest, 1, keys, how)] if rest else [])


def _span(start: int, rows: int, blocks: int, keys: int, how: Scores) -> Span:
    """Blocks against all keys that a row of theirs may see, one at least, if only to be masked."""
    end, lo, hi = start + rows * blocks, 0, keys
    if how.window is not None:
        lo, hi = max(0, start - how.window + 1), min(hi, end + how.window - 1)
    if how.causal:
        hi = min(hi, end)
    lo = min(lo, keys - 1)
    hi = max(hi, lo + 1)
    return Span(start, rows, blocks, lo, hi, hi - lo)


def forward_head(head: Head, *, rows: int, how: Scores) -> tuple[Array, Array]:
    """o (T, G, D), and max s and 1 / l as (T, G, 2), in the dtype that products give."""
    group = head.q.shape[1]

    def block(span: Span, start: Array | int) -> tuple[Array, Array]:
        s, _ = _scores(head, span, start, how)
        top = lax.stop_gradient(jnp.max(s, 1, keepdims=True))
        top = jnp.where(jnp.isneginf(top), 0, top)
        e = jnp.exp(s - top)
        total = jnp.sum(e, 1, keepdims=True)
        inverse = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
        o = _dot(e, _keys(head.v, span, start), (1, 0), how) * inverse
        normalizers = jnp.concatenate([top, inverse], 1)
        return o.reshape(span.rows, group, -1), normalizers.reshape(span.rows, group, 2)

    parts = []
    for span in spans(head.q.shape[0], head.k.shape[0], rows, how):
        if span.blocks == 1:
            parts.append(block(span, span.start))
        else:

            def step(_: None, start: Array, span: Span = span) -> tuple[None, tuple[Array, Array]]:
                return None, block(span, start)

            _, stacked = _in_turn(step, None, span)
            parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
    o, normalizers = zip(*parts, strict=True)
    return jnp.concatenate(o), jnp.concatenate(normalizers)


def backward_head(
    head: Head, normalizers: Array, do: Array, *, rows: int, how: Scores
) -> tuple[Array, Array, Array, Array | None]:
    """dq (T, G, D), dk (S, D), dv (S, D) and dbias, in the dtype that products give."""
    group, keys = head.q.shape[1], head.k.shape[0]

    def block(span: Span, sums: Any, start: Array | int) -> tuple[Any, tuple[Array, Array | None]]:
        q = _rows(head.q, span, start)
        k, v = (_keys(x, span, start) for x in (head.k, head.v))
        s, capped = _scores(head, span, start, how)
        top, inverse = jnp.split(_rows(normalizers, span, start), 2, 1)
        p = jnp.exp(s - top) * inverse
        error = _rows(do, span, start)
        dv = _dot(p, error, (0, 0), how)
        dp = _dot(error, v, (1, 1), how)
        ds = p * (dp - jnp.sum(p * dp, 1, keepdims=True))
        dbias = None
        if head.bias is not None:
            own = _by_bias(ds, head.bias, group)
            unseen = jnp.zeros((*own.shape[:2], keys), own.dtype)
            dbias = lax.dynamic_update_slice_in_dim(unseen, own, span.first(start), 2)
        if capped is not None:
            ds = ds * (1 - jnp.square(capped))
        dq = _dot(ds, k, (1, 0), how).reshape(span.rows, group, -1)
        return _added(sums, (_dot(ds, q, (0, 0), how), dv), span.first(start)), (dq, dbias)

    sums = (varying(jnp.zeros(head.k.shape, how.gives), head, do),) * 2
    dq, dbias = [], []
    for span in spans(head.q.shape[0], keys, rows, how):
        if span.blocks == 1:
            sums, (dq_part, dbias_part) = block(span, sums, span.start)
        else:
            sums, stacked = _in_turn(functools.partial(block, span), sums, span)
            dq_part = stacked[0].reshape(-1, *stacked[0].shape[2:])
            dbias_part = stacked[1]
            if dbias_part is not None:
                joined = jnp.moveaxis(dbias_part, 0, 1)
                dbias_part = joined.reshape(joined.shape[0], -1, keys)
        dq.append(dq_part)
        if dbias_part is not None:
            dbias.append(dbias_part)
    return (
        jnp.concatenate(dq) * how.scale,
        sums[0] * how.scale,
        sums[1],
        jnp.concatenate(dbias, 1) if dbias else None,
    )


def _scores(head: Head, span: Span, start: Array | int, how: Scores) -> tuple[Array, Array | None]:
    """The scores of a block, and tanh(s / cap) of those that are capped."""
    s = _dot(_rows(head.q, span, start), _keys(head.k, span, start), (1, 1), how) * how.scale
    capped = None
    if how.soft_cap is not None:
        capped = jnp.tanh(s / how.soft_cap)
        s = how.soft_cap * capped
    if head.bias is not None:
        bias = lax.dynamic_slice_in_dim(head.bias, start, span.rows, 1)
        bias = _keys(bias, span, start, 2)
        group = head.q.shape[1]
        bias = jnp.broadcast_to(bias, (group, *bias.shape[1:]))
        s = s + jnp.moveaxis(bias, 0, 1).reshape(s.shape).astype(s.dtype)
    seen = _seen(head, span, start, how)
    return (s if seen is None else jnp.where(seen, s, -jnp.inf)), capped


def _seen(head: Head, span: Span, start: Array | int, how: Scores) -> Array | None:
    """Which keys a block's rows see: (R G, n), or with axes of 1; None for all of them.

    By position only where that decides: most blocks are as a whole below the diagonal.
    """
    group = head.q.shape[1]
    shape = (span.rows * group, span.width)
    row = start + lax.broadcasted_iota(jnp.int32, shape, 0) // group
    column = span.first(start) + lax.broadcasted_iota(jnp.int32, shape, 1)
    conditions = []
    if how.causal and span.hi - 1 > span.start:
        conditions.append(column <= row)
    if how.window is not None:
        if span.last - span.lo >= how.window:
            conditions.append(row - column < how.window)
        if not how.causal and span.hi - 1 - span.start >= how.window:
            conditions.append(column - row < how.window)
    if head.mask is not None:
        conditions.append(_keys(head.mask, span, start)[None])
    if head.segments is not None:
        own = lax.dynamic_slice_in_dim(head.segments, start, span.rows)
        own = jnp.repeat(own, group)[:, None]
        conditions.append(own == _keys(head.key_segments, span, start)[None])
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _by_bias(ds: Array, bias: Array, group: int) -> Array:
    """The error of a block's scores (R G, n) as that of its bias (G or 1, R, n)."""
    ds = jnp.moveaxis(ds.reshape(-1, group, ds.shape[-1]), 1, 0)
    return jnp.sum(ds, 0, keepdims=True) if bias.shape[0] < group else ds


def _rows(x: Array, span: Span, start: Array | int) -> Array:
    """A block's tokens of x (T, G, D) as rows (R G, D)."""
    return lax.dynamic_slice_in_dim(x, start, span.rows).reshape(-1, x.shape[-1])


def _keys(x: Array, span: Span, start: Array | int, axis: int = 0) -> Array:
    """What x has of a block's keys."""
    return lax.dynamic_slice_in_dim(x, span.first(start), span.width, axis)


def _added(sums: Any, more: Any, at: Array | int) -> Any:
    """Sums over keys with those of some keys added, which begin at `at`."""

    def add(sums: Array, more: Array) -> Array:
        own = lax.dynamic_slice_in_dim(sums, at, more.shape[0])
        return lax.dynamic_update_slice_in_dim(sums, own + more, at, 0)

    return jax.tree.map(add, sums, more)


def _in_turn(step: Callable[[Any, Array], tuple[Any, Any]], carry: Any, span: Span) -> Any:
    """`lax.scan` over where the blocks of a span begin."""
    starts = span.start + span.rows * jnp.arange(span.blocks, dtype=jnp.int32)
    return lax.scan(step, carry, starts, unroll=AT_A_TIME if span.moves else 1)


def _dot(a: Array, b: Array, axes: tuple[int, int], how: Scores) -> Array:
    """The product over one axis of each, of what products read."""
    a, b = a.astype(how.reads), b.astype(how.reads)
    over = ((axes[0],), (axes[1],)), ((), ())
    return lax.dot_general(a, b, over, preferred_element_type=how.gives)
