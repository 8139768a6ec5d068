"""Metrics: what is reported beside the loss, and how it is put together from parts of a batch.

A metric is a function of (predictions, targets, weights=None), not differentiated. What it gives
says how two parts combine: a (sum, weight) pair, as a loss gives, is a `Mean`; `Sum`, `Max` and
`Last` are named. So a metric of micro-batches is that of the batch.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from backhand.arrays import at_least, inverse, is_floating
from backhand.losses import ctc_targets


class Mean(NamedTuple):
    """A weighted mean: sums and weights add up, and are divided once; 0 where nothing was seen."""

    total: Array
    weight: Array

    def wide(self, dtype: DTypeLike) -> "Mean":
        """The same in what sums run in: `dtype`, or its own where that is wider."""
        return Mean(_wide(self.total, dtype), _wide(self.weight, dtype))

    def combine(self, kept: Array | None = None) -> "Mean":
        """One, from parts stacked on a leading axis; of those that are `kept` (K,)."""
        return Mean(_added(self.total, kept), _added(self.weight, kept))

    def value(self) -> Array:
        """The mean."""
        return self.total * inverse(self.weight)


class Sum(NamedTuple):
    """A sum, such as a count."""

    total: Array

    def wide(self, dtype: DTypeLike) -> "Sum":
        """The same in what sums run in: `dtype`, or its own where that is wider."""
        return Sum(_wide(self.total, dtype))

    def combine(self, kept: Array | None = None) -> "Sum":
        """One, from parts stacked on a leading axis; of those that are `kept` (K,)."""
        return Sum(_added(self.total, kept))

    def value(self) -> Array:
        """The sum."""
        return self.total


class Max(NamedTuple):
    """The largest of the parts."""

    largest: Array

    def wide(self, dtype: DTypeLike) -> "Max":
        """The same: nothing is summed."""
        return self

    def combine(self, kept: Array | None = None) -> "Max":
        """One, from parts stacked on a leading axis; of those that are `kept` (K,)."""
        return Max(jnp.max(_filled(self.largest, kept), 0))

    def value(self) -> Array:
        """The largest."""
        return self.largest


class Last(NamedTuple):
    """That of the last part: an array, or a tree of them."""

    latest: Any

    def wide(self, dtype: DTypeLike) -> "Last":
        """The same: nothing is summed."""
        return self

    def combine(self, kept: Array | None = None) -> "Last":
        """One, from parts stacked on a leading axis; of those that are `kept` (K,)."""
        return Last(jax.tree.map(lambda parts: _filled(parts, kept)[-1], self.latest))

    def value(self) -> Any:
        """The last."""
        return self.latest


Reduction: TypeAlias = Mean | Sum | Max | Last

RESERVED = frozenset(
    {"loss", "gradient_norm", "empty", "clipped", "dropped", "skipped", "loss_scale"}
)
"""Names of what a training step reports itself."""


def check_names(names: Iterable[str]) -> None:
    """Refuses metrics with names that would hide what a training step reports.

    Raises:
        ValueError: saying which.
    """
    for name in names:
        if name in RESERVED:
            raise ValueError(
                f"no metric or objective may be named {name!r}, which a training step reports "
                f"itself; reserved are {', '.join(sorted(RESERVED))}"
            )


def _wide(x: Array, dtype: DTypeLike) -> Array:
    """A sum in `dtype`, or in its own where that is wider or no floating-point one."""
    x = jnp.asarray(x)
    return x.astype(at_least(x.dtype, dtype)) if is_floating(x) else x


def _added(parts: Array, kept: Array | None) -> Array:
    """The sum over the first axis of the parts that are kept; None keeps all."""
    if kept is None:
        return jnp.sum(parts, 0)
    return jnp.sum(parts, 0, where=kept.reshape(-1, *[1] * (parts.ndim - 1)))


def _filled(parts: Array, kept: Array | None) -> Array:
    """The parts, with the last one that is kept for each that is not; the first if none is."""
    if kept is None:
        return parts
    places = jnp.arange(kept.size, dtype=jnp.int32)
    return parts[jnp.where(kept, places, jnp.max(jnp.where(kept, places, 0)))]


def reduction(measured: Any) -> Reduction:
    """What a metric gave, with the rule by which it combines: a (sum, weight) pair is a `Mean`.

    Raises:
        TypeError: for anything else that does not name its rule.
    """
    if isinstance(measured, Reduction):
        return measured
    if type(measured) is tuple and len(measured) == 2:
        return Mean(*(jnp.asarray(part) for part in measured))
    raise TypeError(
        "a metric gives a (sum, weight) pair, or Mean, Sum, Max or Last of backhand.metrics; got "
        f"{type(measured).__name__}"
    )


def accuracy(
    logits: Float[Array, "*positions V"],
    targets: Integer[Array, "*positions"],
    weights: Array | None = None,
) -> Mean:
    """The weighted share of positions whose largest logit is the label's.

    Args:
        logits: (B, ..., V).
        targets: integer labels (B, ...).
        weights: per example or per position, its shape a prefix of that of the targets.

    Raises:
        TypeError: for logits with something beside them.
        ValueError: if the shapes do not fit.

    Example:
        >>> round(float(accuracy(jnp.eye(3), jnp.array([0, 1, 0])).value()), 4)
        0.6667
    """
    if isinstance(logits, tuple):
        raise TypeError(
            "accuracy needs logits as one array, got a tuple: beside a state or a balance it is "
            "lambda y, targets, weights=None: bh.metrics.accuracy(y[0], targets, weights)"
        )
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"accuracy needs labels of shape {logits.shape[:-1]}, got {targets.shape}")
    hits = jnp.argmax(logits, -1).astype(targets.dtype) == targets
    if weights is None:
        weights = jnp.ones(hits.shape[:1])
    if weights.shape != hits.shape[: weights.ndim]:
        raise ValueError(
            f"accuracy needs weights whose shape begins as that of the labels {hits.shape}, got "
            f"{weights.shape}"
        )
    w = weights.astype(jnp.float32).reshape(weights.shape + (1,) * (hits.ndim - weights.ndim))
    return Mean(jnp.sum(w * hits.astype(w.dtype)), jnp.sum(jnp.broadcast_to(w, hits.shape)))


def impossible_alignments(
    logits: Float[Array, "B T V"], targets: ctc_targets.Targets, weights: Array | None = None
) -> Mean:
    """The share of examples that `bh.losses.ctc` cannot align and leaves out.

    These have fewer frames than labels and blanks between equal ones. Of examples whose weight is
    not 0; the total alone is how many there are. Labels in NumPy arrays are not left out: an
    objective refuses them, see `ctc`.

    Args:
        logits: (B, T, V).
        targets: those of `bh.losses.ctc`.
        weights: per example, (B,).

    Raises:
        TypeError: for targets that `ctc` refuses.
        ValueError: likewise.

    Example:
        >>> targets = {"labels": jnp.array([[1, 2], [2, 2]])}
        >>> metric = impossible_alignments(jnp.zeros((2, 2, 3)), targets)
        >>> int(metric.total), float(metric.value())
        (1, 0.5)
    """
    ctc_targets.check(logits, targets, weights, 0)
    fits = ctc_targets.read(logits, targets, 0).fits
    seen = jnp.ones_like(fits) if weights is None else weights != 0
    return Mean(
        jnp.sum(seen & ~fits, dtype=jnp.int32).astype(jnp.float32),
        jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32),
    )


def state(predictions: Any, targets: Any, weights: Any = None) -> Last:
    """The state that predictions (y, state) end in, from which the next window goes on.

    Of one whole batch: a step that accumulates over micro-batches gives the last one's.

    Example:
        >>> float(state((jnp.ones(2), 3.0), None).value())
        3.0
    """
    return Last(predictions[1])
