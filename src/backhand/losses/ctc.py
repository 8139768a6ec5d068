"""Connectionist temporal classification: what was said, without knowing when.

T frames give logits over V symbols, one of them a blank. A path of T symbols reads as the labels
y_1 ... y_L once repetitions are merged and blanks dropped; the loss is -log P, with P the
probability of all paths that read so. Two kinds of places are reached by frame t, in log space:

    a_t(i) = log p_t(blank) + log(e^a_{t-1}(i) + e^c_{t-1}(i-1))              i labels and a blank
    c_t(i) = log p_t(y_i) + log(e^c_{t-1}(i) + e^a_{t-1}(i) [+ e^c_{t-1}(i-1)])      label i itself

the last term only where y_i is not y_{i-1}: between equal labels there is a blank. P is what the
last frame leaves at a(L) and c(L). Backwards runs the probability g of having been at a place,
given the labels: what is at a place came from those before it, as the terms of its sum:

    g_{t-1}(s) = sum over s' after s of g_t(s') e^alpha_{t-1}(s) / sum over r before s' of the same

with alpha for a and c. Only differences within a frame occur, and what leaves a frame arrives in
the one before. So rounding does not grow with T, as it does in alpha + beta - log P; a and c are
kept less their largest in each frame. The blame of the logits is once more what was predicted less
what was true:

    dlogits_t(v) = p_t(v) - sum of g_t(s) over the places s whose symbol is v
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import like_primal, upcast
from backhand.losses.common import Sum, masked, spread, weighted_sum_backward
from backhand.losses.ctc_targets import Alignment, Targets, check, check_values, read
from backhand.protocol import Loss

NEVER = -1e30
"""The logarithm of no probability: finite, so that differences of two are no NaN."""


class Residuals(NamedTuple):
    """Logits, their log-sum-exp and, time first, the log-probabilities of places."""

    logits: Float[Array, "B T V"]
    targets: Targets
    weights: Array | None
    losses: Float[Array, " B"]
    log_sum: Float[Array, "B T"]
    a: Float[Array, "T B L+1"]
    c: Float[Array, "T B L"]


def ctc_forward(
    logits: Float[Array, "B T V"],
    targets: Targets,
    weights: Array | None = None,
    *,
    blank: int = 0,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l = -log P(labels | logits) for each example.

    Labels that cannot be aligned, since there are fewer frames than labels and blanks between equal
    ones, have no loss: such an example has weight 0, and `bh.metrics.impossible_alignments` counts
    it. In a batch of NumPy arrays, which an objective reads before anything compiles, they are an
    error that says which; on a device, `jax.device_put(batch)`, they are left out and counted.
    Labels whose every path meets a logit of -inf have an infinite loss and no blame: a weight
    may not depend on predictions. What is beyond the lengths, logits and labels, has no effect.

    Args:
        logits: (B, T, V), T at least 1.
        targets: a dict of integers: "labels" (B, L), L at least 1, and the number that is there of
            each, "label_lengths" (B,) and "input_lengths" (B,), all of L and of T by default. A
            label outside of [0, V), or blank, gives NaN and no blame, so that it is noticed, unless
            its weight is 0; a length outside of the padding, where only the device knows it, too.
        weights: per example, (B,).
        blank: the symbol that stands for none, in [0, V).

    Raises:
        TypeError: if logits are not floating point, or targets no dict of integers.
        ValueError: if the shapes do not fit, blank is not in [0, V), or lengths that are known
            are outside of the padding.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> logits = jnp.zeros((1, 2, 3))
        >>> total, weight = bh.losses.ctc(logits, {"labels": jnp.array([[1]])})
        >>> round(float(jnp.exp(-total)), 4)  # the paths 11, -1 and 1- of nine
        0.3333

        Labels that need more frames than there are, reported beside the loss:

        >>> short = {"labels": jnp.array([[1], [2]]), "input_lengths": jnp.array([2, 0])}
        >>> float(bh.metrics.impossible_alignments(jnp.zeros((2, 2, 3)), short).value())
        0.5
        >>> share = {"impossible": bh.metrics.impossible_alignments}
        >>> speech = bh.objective(bh.dense(3), bh.losses.ctc, metrics=share)

    References:
        Graves et al., "Connectionist temporal classification", 2006.
    """
    check(logits, targets, weights, blank)
    batch = read(logits, targets, blank)
    x = _heard(logits, batch)
    top = lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    log_sum = (top + jnp.log(jnp.sum(jnp.exp(x - top), -1, keepdims=True)))[..., 0]
    of_blank = (x[..., blank] - log_sum).T[..., None]
    index = jnp.clip(batch.labels, 0, x.shape[-1] - 1)[:, None, :]
    of_label = jnp.moveaxis(jnp.take_along_axis(x, index, -1) - log_sum[..., None], 1, 0)
    of_blank, of_label = (jnp.maximum(log_p, NEVER) for log_p in (of_blank, of_label))
    a, c, shift = _places(of_blank, of_label, batch.skips)
    last = jnp.clip(batch.frames - 1, 0)[:, None]
    log_p = jnp.logaddexp(*_ends(a, c, batch, last))
    log_p = log_p + jnp.sum(jnp.where(_there(batch, logits), shift[..., 0].T, 0), 1)
    losses = jnp.where(log_p < 0.1 * NEVER, jnp.inf, -log_p)
    losses = jnp.where(batch.frames == 0, 0, losses)  # then there are no labels either
    losses = jnp.where(batch.counts, losses, 0)
    losses = jnp.where(batch.valid, losses, jnp.nan)
    residuals = Residuals(logits, targets, weights, losses, log_sum, a, c)
    w = _weights(weights, losses, batch)
    return (jnp.sum(masked(w, losses)), jnp.sum(w)), residuals


def ctc_backward(
    residuals: Residuals, dy: Sum, *, blank: int = 0
) -> tuple[Array, None, Array | None]:
    logits, targets, weights, losses, log_sum, a, c = residuals
    batch = read(logits, targets, blank)
    dlosses = _weights(weights, losses, batch) * dy[0].astype(losses.dtype)
    noticed = ~batch.valid | (losses == jnp.inf)
    dlosses = jnp.where(noticed, 0, dlosses)[:, None, None]
    at_blank, at_label = _visits(a, c, batch)
    p = jnp.exp(_heard(logits, batch) - log_sum[..., None])
    dx = p - _by_symbol(at_blank, at_label, batch.labels, blank, p)
    dx = jnp.where(_there(batch, logits)[..., None], masked(dlosses, dx), 0)
    dweights = weighted_sum_backward(losses, weights, dy)[1]
    if dweights is not None:
        dweights = jnp.where(batch.counts, dweights, 0)
    return like_primal(dx, logits), None, dweights


def _there(batch: Alignment, logits: Array) -> Array:
    """Which frames there are, (B, T)."""
    t = lax.broadcasted_iota(batch.frames.dtype, logits.shape[:2], 1)
    return t < batch.frames[:, None]


def _heard(logits: Array, batch: Alignment) -> Array:
    """The logits, 0 in frames that are not there."""
    return jnp.where(_there(batch, logits)[..., None], upcast(logits), 0)


def _weights(weights: Array | None, losses: Array, batch: Alignment) -> Array:
    return jnp.where(batch.counts, spread("ctc", weights, losses), 0)


def _places(blank: Array, label: Array, skips: Array) -> tuple[Array, Array, Array]:
    """The log-probabilities a (T, B, L + 1) and c (T, B, L) of all places, less their shifts.

    A shift (T, B, 1) is the largest of its frame; they add up from frame to frame.
    """

    def step(before: tuple[Array, Array], frame: tuple[Array, Array]) -> tuple[Any, Any]:
        logs = [jnp.log(sum(parts)) + top for parts, top in _parts(*before, skips)]
        a, c, shift = shifted(logs[0] + frame[0], logs[1] + frame[1])
        return (a, c), (a, c, shift)

    def shifted(a: Array, c: Array) -> tuple[Array, Array, Array]:
        largest = jnp.maximum(jnp.max(a, 1, keepdims=True), jnp.max(c, 1, keepdims=True))
        largest = lax.stop_gradient(largest)
        return a - largest, c - largest, largest

    def begun(x: Array) -> Array:
        return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) == 0, x, NEVER)

    a = begun(jnp.concatenate([blank[0], jnp.full_like(label[0], NEVER)], 1))
    first = shifted(a, begun(label[0]))
    _, rest = lax.scan(step, first[:2], (blank[1:], label[1:]))
    a, c, shift = (
        jnp.concatenate([one[None], others]) for one, others in zip(first, rest, strict=True)
    )
    return a, c, shift


def _parts(a: Array, c: Array, skips: Array) -> list[tuple[list[Array], Array]]:
    """Of the places with a blank and at a label: the terms of their sums, and what is left out.

    That is the logarithm of the largest term.
    """
    behind = jnp.concatenate([jnp.full_like(c[:, :1], NEVER), c[:, :-1]], 1)
    to_blank = (a, jnp.concatenate([behind, c[:, -1:]], 1))
    to_label = (c, a[:, :-1], jnp.where(skips, behind, NEVER))
    found = []
    for logs in (to_blank, to_label):
        top = lax.stop_gradient(functools.reduce(jnp.maximum, logs))
        found.append(([jnp.exp(log - top) for log in logs], top))
    return found


def _visits(a: Array, c: Array, batch: Alignment) -> tuple[Array, Array]:
    """The probability of having been at each place, given the labels: (T, B, L + 1), (T, B, L)."""
    last = jnp.clip(batch.frames - 1, 0)[:, None]
    ends = _ends(a, c, batch, last)
    log_p = jnp.logaddexp(*ends)
    lengths = batch.lengths[:, None]
    place = lax.broadcasted_iota(jnp.int32, a.shape[1:], 1)
    last_a = jnp.where(place == lengths, jnp.exp(ends[0] - log_p)[:, None], 0)
    last_c = jnp.where(place[:, 1:] == lengths, jnp.exp(ends[1] - log_p)[:, None], 0)

    def visited(t: Array, after: tuple[Array, Array]) -> tuple[Array, Array]:
        ends = t == batch.frames[:, None] - 1
        return jnp.where(ends, last_a, after[0]), jnp.where(ends, last_c, after[1])

    def step(after: tuple[Array, Array], frame: tuple[Array, ...]) -> tuple[Any, Any]:
        t, a, c = frame
        ga, gc = visited(t + 1, after)
        (to_blank, _), (to_label, _) = _parts(a, c, batch.skips)
        stayed, ended = (ga / sum(to_blank) * part for part in to_blank)
        held, begun, skipped = (gc / sum(to_label) * part for part in to_label)
        gap = jnp.zeros_like(gc[:, :1])
        before_a = stayed + jnp.concatenate([begun, gap], 1)
        before_c = held + ended[:, 1:] + jnp.concatenate([skipped[:, 1:], gap], 1)
        return (before_a, before_c), (ga, gc)

    t = jnp.arange(len(a) - 1, dtype=jnp.int32)
    nothing = (jnp.zeros_like(last_a), jnp.zeros_like(last_c))
    first, (ga, gc) = lax.scan(step, nothing, (t, a[:-1], c[:-1]), reverse=True)
    first = visited(jnp.zeros((), jnp.int32), first)
    return jnp.concatenate([first[0][None], ga]), jnp.concatenate([first[1][None], gc])


def _ends(a: Array, c: Array, batch: Alignment, last: Array) -> tuple[Array, Array]:
    """a(L) and c(L) in the last frame of each example, (B,)."""
    lengths = batch.lengths[:, None]

    def at(x: Array, place: Array) -> Array:
        rows = jnp.take_along_axis(x, last[None].astype(jnp.int32), 0, mode="clip")[0]
        return jnp.take_along_axis(rows, place, 1, mode="clip")[:, 0]

    end = at(c, jnp.maximum(lengths - 1, 0))
    return at(a, lengths), jnp.where(batch.lengths > 0, end, NEVER)


def _by_symbol(at_blank: Array, at_label: Array, labels: Array, blank: int, like: Array) -> Array:
    """The probability of each symbol in each frame, given the labels: (B, T, V)."""
    onehot = (
        labels[..., None] == lax.broadcasted_iota(labels.dtype, (*labels.shape, like.shape[-1]), 2)
    ).astype(like.dtype)
    said = jnp.einsum("tbl,blv->btv", at_label, onehot)
    none = jnp.sum(at_blank, -1).T[..., None]
    return said + jnp.where(lax.broadcasted_iota(jnp.int32, like.shape, 2) == blank, none, 0)


def ctc_reference(
    logits: Array, targets: Targets, weights: Array | None = None, *, blank: int = 0
) -> Sum:
    """Over the labels with a blank on either side of each, two logarithms at a time."""
    log_p = jax.nn.log_softmax(upcast(logits))
    labels = targets["labels"]
    size, most = labels.shape
    full = jnp.ones(size, jnp.int32)
    lengths = targets.get("label_lengths", most * full)
    frames = targets.get("input_lengths", log_p.shape[1] * full)
    symbols = jnp.full((size, 2 * most + 1), blank, labels.dtype).at[:, 1::2].set(labels)
    other = (symbols != jnp.roll(symbols, 2, 1)).at[:, :2].set(False)
    start = jnp.full(symbols.shape, NEVER, log_p.dtype).at[:, 0].set(0)

    def step(alpha: Array, frame: tuple[Array, Array]) -> tuple[Array, None]:
        t, log_p = frame
        one = jnp.roll(alpha, 1, 1).at[:, 0].set(NEVER)
        two = jnp.where(other, jnp.roll(alpha, 2, 1), NEVER)
        new = jnp.logaddexp(jnp.logaddexp(alpha, one), two)
        new = new + jnp.take_along_axis(log_p, symbols, 1, mode="clip")
        return jnp.where((t < frames)[:, None], new, alpha), None

    t = jnp.arange(log_p.shape[1], dtype=frames.dtype)
    alpha, _ = lax.scan(step, start, (t, jnp.moveaxis(log_p, 1, 0)))
    end = 2 * lengths[:, None]
    blank_last = jnp.take_along_axis(alpha, end, 1)[:, 0]
    label_last = jnp.take_along_axis(alpha, jnp.maximum(end - 1, 0), 1)[:, 0]
    losses = -jnp.logaddexp(blank_last, jnp.where(lengths > 0, label_last, NEVER))
    w = jnp.ones_like(losses) if weights is None else weights.astype(losses.dtype)
    equal = labels[:, 1:] == labels[:, :-1]
    there = jnp.arange(1, most, dtype=lengths.dtype)[None] < lengths[:, None]
    needed = lengths + jnp.sum(equal & there, 1, dtype=lengths.dtype)
    w = jnp.where(frames.astype(needed.dtype) < needed, 0, w)
    losses = jnp.where(losses >= -0.1 * NEVER, jnp.inf, losses)  # not where it is NaN
    return jnp.sum(masked(w, losses)), jnp.sum(w)


ctc = Loss("ctc", ctc_forward, ctc_backward, ctc_reference, check_values)
