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
        rtol: the largest difference, over the largest magnitude in the leaf.

    Raises:
        AssertionError: naming the split, the leaf, and by how much it is off; for a leaf that is
            not finite.
        ValueError: for fewer than two splits.

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
    if len(splits) < 2:
        raise ValueError(f"accumulation is compared between splits, two or more; got {splits}")
    first = jax.tree_util.tree_leaves_with_path(step(batch, splits[0]))
    for split in splits[1:]:
        other = jax.tree_util.tree_leaves_with_path(step(batch, split))
        assert [path for path, _ in first] == [path for path, _ in other], (
            f"{split} micro-batches instead of {splits[0]} give a tree of another structure"
        )
        for (path, a), (_, b) in zip(first, other, strict=True):
            a, b = _numbers(a), _numbers(b)
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the result"
            assert a.shape == b.shape, f"{name}: {a.shape} becomes {b.shape} at {split}"
            for values, at in ((a, splits[0]), (b, split)):
                assert np.isfinite(values).all(), f"{name} is not finite at {at}"
            largest = np.abs(a).max(initial=0) or 1.0
            off = np.abs(a - b).max(initial=0) / largest
            assert off <= rtol, (
                f"{split} micro-batches instead of {splits[0]} change {name} by {off:.3g} of its "
                "largest magnitude"
            )


def _numbers(leaf: Any) -> Any:
    """A leaf in float64; of a key, its words."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)
