"""Assertions for anyone's training code."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def assert_accumulation_exact(
    step: Callable[[Any, int], Any],
    batch: Any,
    splits: Sequence[int] = (1, 2, 4),
    *,
    rtol: float = 1e-5,
) -> None:
    """Passes if a step gives the same for a batch however many micro-batches it is computed in.

    Give it a batch that is masked or ragged: equal weights hide a mean of means.

    Args:
        step: `(batch, micro_batches) -> tree`, for instance of a loss and gradients.
        batch: what the step takes.
        splits: numbers of micro-batches; the first is what the others are held against.
        rtol: the largest difference, over the largest magnitude in the leaf. Any leaf may also be
            off by 8 roundings of the largest magnitude in the tree, in float32 at the coarsest: a
            gradient that is zero but for rounding, as that of a key's bias in attention, has no
            relative error.

    Raises:
        AssertionError: naming the split, the leaf, and by how much it is off; for a leaf that is
            not finite.
        ValueError: for fewer than two different splits.

    Example:
        >>> import jax.numpy as jnp
        >>> def mean_of_means(batch, splits):
        ...     x, w = (jnp.stack(jnp.split(leaf, splits)) for leaf in batch)
        ...     return jnp.mean(jnp.sum(x * w, 1) / jnp.sum(w, 1))
        >>> batch = jnp.arange(4.0), jnp.array([1.0, 1.0, 1.0, 0.0])
        >>> try:
        ...     assert_accumulation_exact(mean_of_means, batch, splits=[1, 2])
        ... except AssertionError as error:
        ...     print(error)
        2 micro-batches instead of 1 change the result by 0.25 of its largest magnitude
    """
    if len(set(splits)) < 2:
        raise ValueError(
            f"accumulation is compared between two or more different splits, got {list(splits)}"
        )
    first = jax.tree_util.tree_leaves_with_path(step(batch, splits[0]))
    largest = max((_largest(leaf) for _, leaf in first if _is_floating(leaf)), default=0.0)
    for split in splits[1:]:
        other = jax.tree_util.tree_leaves_with_path(step(batch, split))
        assert [path for path, _ in first] == [path for path, _ in other], (
            f"{split} micro-batches instead of {splits[0]} give a tree of another structure"
        )
        for (path, a), (_, b) in zip(first, other, strict=True):
            floor = 8 * _rounding(a) * largest
            a, b = _numbers(a), _numbers(b)
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the result"
            assert a.shape == b.shape, f"{name}: {a.shape} becomes {b.shape} at {split}"
            for values, at in ((a, splits[0]), (b, split)):
                assert np.isfinite(values).all(), f"{name} is not finite at {at}"
            magnitude = np.abs(a).max(initial=0) or 1.0
            off = np.abs(a - b).max(initial=0)
            assert off <= max(rtol * magnitude, floor), (
                f"{split} micro-batches instead of {splits[0]} change {name} by "
                f"{off / magnitude:.3g} of its largest magnitude"
            )


def _is_floating(leaf: Any) -> bool:
    """Whether a leaf holds real numbers; a key does not."""
    return bool(jnp.issubdtype(_dtype(leaf), jnp.floating))


def _dtype(leaf: Any) -> Any:
    """The dtype of a leaf; of a Python number, NumPy's."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)


def _rounding(leaf: Any) -> float:
    """The relative error of one rounding in the dtype of a leaf; 0 for integers and keys."""
    if not _is_floating(leaf):
        return 0.0
    return float(min(jnp.finfo(_dtype(leaf)).eps, jnp.finfo(jnp.float32).eps)) / 2


def _largest(leaf: Any) -> float:
    """The largest finite magnitude in a leaf."""
    values = np.abs(_numbers(leaf))
    return float(values.max(initial=0, where=np.isfinite(values)))


def _numbers(leaf: Any) -> Any:
    """A leaf in float64; of a key, its words."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)
