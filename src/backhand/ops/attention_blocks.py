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
    """How scores are made of queries and keys, what products read, and what they give.

    With `keys_first` a block is held as (n, R G). XLA on CPU then has all products in the form that
    it is fast at, a matrix whose columns meet another's rows, where (R G, n) leaves dk and dv to a
    slower one. Both ways, 256 heads of 16 tokens and features at once took 0.65 of the time; on the
    way back, in turn, 8 heads of 64 features took 0.86 of it (1,024 tokens, or 2,048 causal).

    `q_scaled` scales queries, not scores: on CPU the product, its maximum and the exponential are
    one kernel then, where nothing is hidden. A loop takes `together` blocks in a step: XLA runs
    what does not wait for each other on several cores.
    """

    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None
    reads: DTypeLike
    gives: DTypeLike
    keys_first: bool = False
    q_scaled: bool = False
    together: int = 1

    @property
    def axes(self) -> tuple[int, int]:
        """The axes of rows and of keys in a block of scores."""
        return (1, 0) if self.keys_first else (0, 1)


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


def forward_head(head: Head, *, rows: int, how: Scores) -> tuple[Array, tuple[Array, Array]]:
    """o (T, G, D), and max s and 1 / l, each (T G,), in the dtype that products give."""
    group, (_, keys) = head.q.shape[1], how.axes
    v = _values(head.v, how)
    masked = how.causal or how.window is not None or any(x is not None for x in head[3:])

    def block(span: Span, start: Array | int) -> tuple[Array, Array, Array]:
        s, _ = _scores(head, span, start, how)
        top = jnp.max(s, keys, keepdims=True)
        if masked:  # a row may see no key; without a mask, scores of -inf are an overflow, and NaN
            top = jnp.maximum(top, jnp.finfo(top.dtype).min)
        e = jnp.exp(s - top)
        total = jnp.sum(e, keys, keepdims=True)
        inverse = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
        o = _by_row(e, _keys(v, span, start, keys ^ 1), how) * inverse.reshape(-1, 1)
        return o.reshape(span.rows, group, -1), top.reshape(-1), inverse.reshape(-1)

    parts = []
    for span in spans(head.q.shape[0], head.k.shape[0], rows, how):
        if span.blocks == 1:
            parts.append(block(span, span.start))
        else:

            def step(_: None, start: Array, span: Span = span) -> tuple[None, tuple[Array, ...]]:
                return None, block(span, start)

            _, stacked = _in_turn(step, None, span, how)
            parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
    o, top, inverse = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return o, (top, inverse)


def backward_head(
    head: Head, normalizers: tuple[Array, Array], do: Array, *, rows: int, how: Scores
) -> tuple[Array, Array, Array, Array | None]:
    """dq (T, G, D), dk (S, D), dv (S, D) and dbias, in the dtype that products give."""
    group, keys, (row_axis, key_axis) = head.q.shape[1], head.k.shape[0], how.axes
    k_values = _values(head.k, how)

    def block(span: Span, sums: Any, start: Array | int) -> tuple[Any, tuple[Array, Array | None]]:
        q, error = _queries(head, span, start, how), _rows(do, span, start)
        s, capped = _scores(head, span, start, how)
        top, inverse = (
            jnp.expand_dims(lax.dynamic_slice_in_dim(x, start * group, span.rows * group), key_axis)
            for x in normalizers
        )
        p = jnp.exp(s - top) * inverse
        dv = _dot(p, error, (row_axis, 0), how)
        dp = _matches(error, _keys(head.v, span, start), how)
        ds = p * (dp - jnp.sum(p * dp, key_axis, keepdims=True))
        dbias = None
        if head.bias is not None:
            own = _by_bias(ds, head.bias, group, how)
            unseen = jnp.zeros((*own.shape[:2], keys), own.dtype)
            dbias = lax.dynamic_update_slice_in_dim(unseen, own, span.first(start), 2)
        if capped is not None:
            ds = ds * (1 - jnp.square(capped))
        dq = _by_row(ds, _keys(k_values, span, start, key_axis ^ 1), how)
        dk = _dot(ds, q, (row_axis, 0), how)
        dq = dq.reshape(span.rows, group, -1)
        return _added(sums, (dk, dv), span.first(start)), (dq, dbias)

    sums = (varying(jnp.zeros(head.k.shape, how.gives), head, do),) * 2
    dq, dbias = [], []
    for span in spans(head.q.shape[0], keys, rows, how):
        if span.blocks == 1:
            sums, (dq_part, dbias_part) = block(span, sums, span.start)
        else:
            sums, stacked = _in_turn(functools.partial(block, span), sums, span, how)
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
        sums[0] if how.q_scaled else sums[0] * how.scale,
        sums[1],
        jnp.concatenate(dbias, 1) if dbias else None,
    )


def _scores(head: Head, span: Span, start: Array | int, how: Scores) -> tuple[Array, Array | None]:
    """The scores of a block, and tanh(s / cap) of those that are capped."""
    s = _matches(_queries(head, span, start, how), _keys(head.k, span, start), how)
    if not how.q_scaled:
        s = s * how.scale
    capped = None
    if how.soft_cap is not None:
        capped = jnp.tanh(s / how.soft_cap)
        s = how.soft_cap * capped
    if head.bias is not None:
        bias = lax.dynamic_slice_in_dim(head.bias, start, span.rows, 1)
        bias = _keys(bias, span, start, 2)
        group = head.q.shape[1]
        bias = jnp.broadcast_to(bias, (group, *bias.shape[1:]))
        bias = jnp.transpose(bias, (2, 1, 0) if how.keys_first else (1, 0, 2))
        s = s + bias.reshape(s.shape).astype(s.dtype)
    seen = _seen(head, span, start, how)
    return (s if seen is None else jnp.where(seen, s, -jnp.inf)), capped


def _seen(head: Head, span: Span, start: Array | int, how: Scores) -> Array | None:
    """Which keys a block's rows see: shaped as its scores, or with axes of 1; None for all.

    By position only where that decides: most blocks are as a whole below the diagonal.
    """
    group = head.q.shape[1]
    rows, keys = how.axes
    shape = (span.rows * group, span.width)[:: -1 if how.keys_first else 1]
    row = start + lax.broadcasted_iota(jnp.int32, shape, rows) // group
    column = span.first(start) + lax.broadcasted_iota(jnp.int32, shape, keys)
    conditions = []
    if how.causal and span.hi - 1 > span.start:
        conditions.append(column <= row)
    if how.window is not None:
        if span.last - span.lo >= how.window:
            conditions.append(row - column < how.window)
        if not how.causal and span.hi - 1 - span.start >= how.window:
            conditions.append(column - row < how.window)
    if head.mask is not None:
        conditions.append(jnp.expand_dims(_keys(head.mask, span, start), rows))
    if head.segments is not None:
        own = lax.dynamic_slice_in_dim(head.segments, start, span.rows)
        own = jnp.expand_dims(jnp.repeat(own, group), keys)
        conditions.append(own == jnp.expand_dims(_keys(head.key_segments, span, start), rows))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _by_bias(ds: Array, bias: Array, group: int, how: Scores) -> Array:
    """The error of a block's scores as that of its bias (G or 1, R, n)."""
    if how.keys_first:
        ds = ds.reshape(ds.shape[0], -1, group).transpose(2, 1, 0)
    else:
        ds = jnp.moveaxis(ds.reshape(-1, group, ds.shape[-1]), 1, 0)
    return jnp.sum(ds, 0, keepdims=True) if bias.shape[0] < group else ds


def _rows(x: Array, span: Span, start: Array | int) -> Array:
    """A block's tokens of x (T, G, D) as rows (R G, D)."""
    return lax.dynamic_slice_in_dim(x, start, span.rows).reshape(-1, x.shape[-1])


def _queries(head: Head, span: Span, start: Array | int, how: Scores) -> Array:
    """A block's queries, on CPU times the scale already."""
    q = _rows(head.q, span, start)
    return q.astype(how.gives) * how.scale if how.q_scaled else q


def _keys(x: Array, span: Span, start: Array | int, axis: int = 0) -> Array:
    """What x has of a block's keys."""
    return lax.dynamic_slice_in_dim(x, span.first(start), span.width, axis)


def _added(sums: Any, more: Any, at: Array | int) -> Any:
    """Sums over keys with those of some keys added, which begin at `at`."""

    def add(sums: Array, more: Array) -> Array:
        own = lax.dynamic_slice_in_dim(sums, at, more.shape[0])
        return lax.dynamic_update_slice_in_dim(sums, own + more, at, 0)

    return jax.tree.map(add, sums, more)


def _in_turn(
    step: Callable[[Any, Array], tuple[Any, Any]], carry: Any, span: Span, how: Scores
) -> Any:
    """`lax.scan` over where the blocks of a span begin."""
    starts = span.start + span.rows * jnp.arange(span.blocks, dtype=jnp.int32)
    return lax.scan(step, carry, starts, unroll=AT_A_TIME if span.moves else how.together)


def _matches(rows: Array, keys: Array, how: Scores) -> Array:
    """The product of each row and each key (n, D), as a block of scores."""
    return _dot(*((keys, rows) if how.keys_first else (rows, keys)), (1, 1), how)


def _values(x: Array, how: Scores) -> Array:
    """Keys or values (S, D) as `_by_row` takes them, turned once for all blocks: (D, S)."""
    return lax.optimization_barrier(x.T) if how.keys_first else x


def _by_row(p: Array, values: Array, how: Scores) -> Array:
    """What each row takes of the values, (R G, D).

    Turned back behind a barrier, or XLA would take the product in the slow form to save that.
    """
    if how.keys_first:
        return lax.optimization_barrier(_dot(values, p, (1, 0), how)).T
    return _dot(p, values, (1, 0), how)


def _dot(a: Array, b: Array, axes: tuple[int, int], how: Scores) -> Array:
    """The product over one axis of each, of what products read."""
    a, b = a.astype(how.reads), b.astype(how.reads)
    over = ((axes[0],), (axes[1],)), ((), ())
    return lax.dot_general(a, b, over, preferred_element_type=how.gives)
