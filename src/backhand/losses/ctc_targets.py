"""The targets of CTC: labels and lengths as they are read, and what is refused of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Integer

from backhand.arrays import described, is_floating, need_array
from backhand.losses.common import check_weights
from backhand.protocol import listed

Targets = Mapping[str, Array]
LENGTHS = ("label_lengths", "input_lengths")


class Alignment(NamedTuple):
    """Which labels and frames there are, and which examples can be aligned.

    Attributes:
        labels: with what is beyond their lengths.
        lengths: how many labels there are.
        frames: how many frames there are.
        skips: whether a label may follow the one before it without a blank between them.
        fits: whether there are frames enough.
        valid: whether labels and lengths mean something.
    """

    labels: Integer[Array, "B L"]
    lengths: Integer[Array, " B"]
    frames: Integer[Array, " B"]
    skips: Bool[Array, "B L"]
    fits: Bool[Array, " B"]
    valid: Bool[Array, " B"]

    @property
    def counts(self) -> Bool[Array, " B"]:
        """Whether an example has weight: what means nothing has, so that it is noticed."""
        return self.fits | ~self.valid


def read(logits: Array, targets: Targets, blank: int) -> Alignment:
    """The targets of logits (B, T, V), each with its lengths."""
    labels = targets["labels"].astype(jnp.int32)
    full = jnp.ones_like(labels[:, 0])
    limits = {"label_lengths": labels.shape[1], "input_lengths": logits.shape[1]}
    lengths, frames = (
        targets.get(name, limit * full).astype(jnp.int32) for name, limit in limits.items()
    )
    there = lax.broadcasted_iota(jnp.int32, labels.shape, 1) < lengths[:, None]
    first = lax.broadcasted_iota(jnp.int32, labels.shape, 1) == 0
    same = (labels == jnp.concatenate([labels[:, :1], labels[:, :-1]], 1)) & ~first
    repeats = jnp.sum((same & there).astype(jnp.int32), 1, dtype=jnp.int32)
    known = (labels >= 0) & (labels < logits.shape[-1]) & (labels != blank)
    valid = jnp.all(known | ~there, 1)
    for length, limit in zip((lengths, frames), limits.values(), strict=True):
        valid &= (length >= 0) & (length <= limit)
    fits = frames >= lengths + repeats
    return Alignment(labels, lengths, frames, ~same & ~first, fits, valid)


def check(logits: Array, targets: Any, weights: Array | None, blank: int) -> None:
    """Refuses arguments that do not fit each other.

    Raises:
        TypeError: if logits are not floating point, or targets no dict of integers.
        ValueError: if the shapes do not fit, blank is not in [0, V), or lengths that are known are
            outside of the padding.
    """
    if not is_floating(logits):
        raise TypeError(f"ctc needs floating-point logits, got {logits.dtype}")
    names = {"labels", *LENGTHS}
    if not isinstance(targets, Mapping) or "labels" not in targets or targets.keys() - names:
        got = f"a dict of {listed(targets)}" if isinstance(targets, Mapping) else described(targets)
        raise TypeError(
            "ctc needs targets as a dict with 'labels' and, where examples differ, 'label_lengths' "
            f"and 'input_lengths'; got {got}"
        )
    for name, leaf in targets.items():
        need_array("ctc", f"targets[{name!r}]", leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise TypeError(f"ctc needs integers as targets[{name!r}], got {leaf.dtype}")
    if logits.ndim != 3 or 0 in logits.shape[1:]:
        raise ValueError(
            f"ctc needs logits of shape (B, T, V), with a frame and a symbol; got {logits.shape}"
        )
    labels = targets["labels"].shape
    if len(labels) != 2 or labels[0] != logits.shape[0] or labels[1] < 1:
        raise ValueError(
            f"ctc needs, for logits {logits.shape}, labels of shape ({logits.shape[0]}, L) with "
            f"room for one; got {labels}"
        )
    lengths = {name: targets[name] for name in LENGTHS if name in targets}
    for name, leaf in {**lengths, "weights": weights}.items():
        if leaf is not None and leaf.shape != labels[:1]:
            raise ValueError(
                f"ctc needs {name} of shape {labels[:1]}, one per example; got {leaf.shape}"
            )
    if not 0 <= blank < logits.shape[-1]:
        raise ValueError(f"ctc needs blank in [0, {logits.shape[-1]}), got {blank}")
    known = {
        name: np.asarray(leaf)
        for name, leaf in {**lengths, "weights": weights}.items()
        if leaf is not None and not isinstance(leaf, jax.core.Tracer)
    }
    counts = known.pop("weights", np.ones(labels[0])) != 0
    _check_lengths(known, labels[1], logits.shape[1], counts)


def _check_lengths(
    lengths: Mapping[str, np.ndarray], most: int, frames: int, counts: np.ndarray
) -> None:
    """Refuses lengths outside of the padding, of examples that count."""
    for name, limit in zip(LENGTHS, (most, frames), strict=True):
        length = lengths.get(name, np.zeros_like(counts, int))
        wrong = counts & ((length < 0) | (length > limit))
        if wrong.any():
            where = int(wrong.argmax())
            raise ValueError(
                f"{name} must lie in [0, {limit}], the padded length; got {length[where]} at "
                f"[{where}]"
            )


def check_values(logits: Any, targets: Any, weights: Any, *, blank: int = 0) -> None:
    """Refuses, on the host, what has weight and no meaning.

    Raises:
        ValueError: for lengths beyond the padding, labels that are blank or outside of [0, V), or
            more labels than fit into the frames, saying where.
    """
    check_weights(logits, targets, weights)
    if not all(isinstance(leaf, np.ndarray) for leaf in targets.values()):
        return
    labels = targets["labels"]
    size, most = labels.shape
    _, frames, symbols = logits.shape
    counts = np.ones(size, bool) if not isinstance(weights, np.ndarray) else weights != 0
    _check_lengths(targets, most, frames, counts)
    lengths = targets.get("label_lengths", np.full(size, most))
    there = (np.arange(most) < lengths[:, None]) & counts[:, None]
    outside = there & ((labels < 0) | (labels >= symbols) | (labels == blank))
    if outside.any():
        i, j = (int(k) for k in np.argwhere(outside)[0])
        raise ValueError(
            f"labels must lie in [0, {symbols}), the number of logits, and not be blank, {blank}; "
            f"got {labels[i, j]} at [{i}, {j}]"
        )
    repeats = np.sum((labels[:, 1:] == labels[:, :-1]) & there[:, 1:], 1)
    needed = np.where(counts, lengths + repeats, 0)
    given = targets.get("input_lengths", np.full(size, frames))
    if (needed > given).any():
        i = int((needed > given).argmax())
        raise ValueError(
            f"labels longer than the frames: example [{i}] needs {needed[i]} frames, for "
            f"{lengths[i]} labels and {repeats[i]} blanks between equal ones, and has {given[i]}; "
            "give it weight 0, or more frames; in labels on a device such examples are left out"
        )
