"""Assertions for anyone's training code."""

import inspect
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

    Give it a batch that is masked or ragged: equal weights hide a mean of means. And give it
    gradients, or parameters after plain descent: the first update of Adam does not depend on how
    large a gradient is. Dropout must be off, for a key of each micro-batch's own is another noise.

    Args:
        step: `(batch, micro_batches) -> tree`, for instance of a loss and gradients; all else that
            it needs is bound to it.
        batch: what the step takes.
        splits: numbers of micro-batches; the first is what the others are held against. One that
            does not divide the batch shows whether the rest is dropped.
        rtol: the largest difference, over the largest magnitude in the leaf. Any leaf may also be
            off by 8 roundings of the largest magnitude in the tree, in float32 at the coarsest: a
            gradient that is zero but for rounding, as that of a key's bias in attention, has no
            relative error. Integers are to be the same.

    Raises:
        AssertionError: naming the split, the leaf, by how much it is off and what does that, where
            the numbers show it; for a leaf that is not finite, or of another shape or dtype.
        TypeError: for a step of other arguments, or splits that are not a list of numbers.
        ValueError: for fewer than two different splits, or a step that gives nothing.

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
        2 micro-batches instead of 1 change the result by 0.25 of its largest magnitude: ...
    """
    _check_signature(step)
    if np.ndim(splits) != 1 or np.asarray(splits).dtype.kind not in "iu":
        raise TypeError(f"splits is a list of numbers of micro-batches, got {splits!r}")
    if len(set(splits)) < 2:
        raise ValueError(
            f"accumulation is compared between two or more different splits, got {list(splits)}"
        )
    first = jax.tree_util.tree_leaves_with_path(_called(step, batch, splits[0]))
    if not first:
        raise ValueError("the step gave nothing to compare: return its loss and gradients")
    largest = max((_largest(leaf) for _, leaf in first if _is_floating(leaf)), default=0.0)
    for split in splits[1:]:
        other = jax.tree_util.tree_leaves_with_path(_called(step, batch, split))
        assert [path for path, _ in first] == [path for path, _ in other], (
            f"{split} micro-batches instead of {splits[0]} give a tree of another structure"
        )
        for (path, a), (_, b) in zip(first, other, strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the result"
            dtypes = _dtype(a), _dtype(b)
            assert dtypes[0] == dtypes[1], f"{name}: {dtypes[0]} becomes {dtypes[1]} at {split}"
            real, floor = _is_floating(a), 8 * _rounding(a) * largest
            a, b = _numbers(a), _numbers(b)
            assert a.shape == b.shape, f"{name}: {a.shape} becomes {b.shape} at {split}"
            for values, at in ((a, splits[0]), (b, split)):
                assert np.isfinite(values).all(), f"{name} is not finite at {at}"
            magnitude = np.abs(a).max(initial=0) or 1.0
            off = np.abs(a - b).max(initial=0)
            assert off <= (max(rtol * magnitude, floor) if real else 0), (
                f"{split} micro-batches instead of {splits[0]} change {name} by "
                f"{off / magnitude:.3g} of its largest magnitude: {_cause(a, b, split, splits[0])}"
            )


def _check_signature(step: Any) -> None:
    """Refuses what cannot be called with a batch and a number.

    Raises:
        TypeError: saying what is called.
    """
    wanted = "a function step(batch, micro_batches) that gives a tree of arrays"
    if not callable(step):
        raise TypeError(f"assert_accumulation_exact needs {wanted}; got {step!r}")
    try:
        signature = inspect.signature(step)
    except ValueError:  # some callables do not say
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"assert_accumulation_exact needs {wanted}; got one of {signature}. Bind what else it "
            "needs, as in lambda batch, k: step(params, batch, micro_batches=k)"
        ) from error


def _called(step: Callable[[Any, int], Any], batch: Any, split: int) -> Any:
    """What the step gives; an error of its own says how it was called."""
    try:
        return step(batch, split)
    except Exception as error:
        error.add_note(f"assert_accumulation_exact called step(batch, micro_batches={split})")
        raise


def _cause(first: Any, other: Any, split: int, one: int) -> str:
    """What makes a result differ so between two numbers of micro-batches."""
    factor = float(np.vdot(first, other)) / (float(np.vdot(first, first)) or 1.0)
    whole = np.abs(other - factor * first).max() <= 1e-3 * np.abs(other).max()
    for ratio, cause in (
        (split / one, "sums over micro-batches were not divided by the sum of the weights"),
        (one / split, "it was divided by the number of micro-batches once too often"),
    ):
        if whole and ratio != 1 and abs(factor - ratio) <= 1e-3 * ratio:
            return f"it is {factor:.3g} times as large, so {cause}"
    return (
        "most often a mean over micro-batches of their means, which is off where these weigh "
        "differently: add up the sums and the weights, and divide once. Examples that are left out "
        "where a split does not divide them, noise, and sums in low precision are off too"
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
