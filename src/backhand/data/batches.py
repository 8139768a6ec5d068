"""Batches as a function of the step, so that a run resumes from its step number alone."""

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_SHUFFLE = 0x5348_5546  # sets the streams of this file apart from all others of the same seed


def count_examples(arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """The leading length that all `arrays` share; a ValueError where there is no such length."""
    if not arrays:
        raise ValueError(
            "data needs at least one array, got an empty dict; pass for example "
            "{'inputs': x, 'targets': y}"
        )
    scalars = [name for name, array in arrays.items() if array.ndim == 0]
    if scalars:
        raise ValueError(
            f"every array needs a leading axis of examples, got scalars for {scalars}; "
            "repeat them once an example, or leave them out"
        )
    lengths = {name: len(array) for name, array in arrays.items()}
    examples = next(iter(lengths.values()))
    if any(length != examples for length in lengths.values()):
        raise ValueError(
            f"arrays must share one leading length, got {lengths}; give each one row an example"
        )
    if examples == 0:
        raise ValueError(f"data needs at least one example, got none in {list(arrays)}")
    return examples


def shuffled_rows(examples: int, seed: int, *stream: int) -> Rows:
    """A permutation of `range(examples)`; every `(seed, *stream)` gives an independent one.

    Independent also of `np.random.default_rng(seed)`: data that was drawn from the bits which then
    order it would come out sorted. Raw bits are sorted, instead of `Generator.permutation`, because
    NumPy promises the same raw bits in every release, and makes no such promise for what a
    Generator derives from them.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(_SHUFFLE, *stream))
    bits = np.random.PCG64(sequence).random_raw(examples)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def check_seed(seed: SupportsIndex) -> int:
    """`seed` as an int; a ValueError where it is negative."""
    checked = operator.index(seed)
    if checked < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed}")
    return checked


class Batches:
    """An endless stream of shuffled batches, in which any step can be asked for at any time.

    The stream is the concatenation of one permutation of the examples per epoch, and step s reads
    positions [s B, (s + 1) B) of it. Every batch is therefore full, and every example is seen
    exactly once an epoch, also where B does not divide the number of examples N: a batch may span
    the end of an epoch, or several epochs where B > N.

    Args:
        arrays: arrays of one leading length N, by name. They are read, not copied.
        batch_size: B, the examples in a batch.
        seed: the integer >= 0 that the order follows from, together with the step alone.

    Raises:
        ValueError: `arrays` is empty or its lengths disagree, `batch_size` < 1, or `seed` < 0.

    Example:
        >>> import numpy as np
        >>> from backhand.data import Batches
        >>> batches = Batches({"inputs": np.arange(5)}, 2, seed=0)
        >>> seen = np.concatenate([batches[step]["inputs"] for step in range(5)])
        >>> sorted(seen[:5].tolist()), sorted(seen[5:].tolist())
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(
        self, arrays: Mapping[str, npt.ArrayLike], batch_size: SupportsIndex, *, seed: SupportsIndex
    ) -> None:
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.examples = count_examples(self.arrays)
        self.batch_size = operator.index(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.seed = check_seed(seed)
        self._orders: dict[int, Rows] = {}

    @property
    def steps_per_epoch(self) -> float:
        """N / B: the steps in which every example is seen once, not rounded."""
        return self.examples / self.batch_size

    def __getitem__(self, step: SupportsIndex) -> dict[str, npt.NDArray[Any]]:
        """The batch of `step`, a dict of arrays of leading length B; the same whenever asked.

        Raises:
            IndexError: `step` is negative; the stream has no end to count back from.
            TypeError: `step` is not an integer.
        """
        rows = self.rows(step)
        return {name: array[rows] for name, array in self.arrays.items()}

    def rows(self, step: SupportsIndex) -> Rows:
        """Which examples the batch of `step` holds, as row numbers of `arrays`, shape (B,)."""
        start = _check_step(step) * self.batch_size
        end = start + self.batch_size
        pieces = []
        while start < end:
            epoch, offset = divmod(start, self.examples)
            piece = self._order(epoch)[offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces)

    def _order(self, epoch: int) -> Rows:
        """The permutation of `epoch`; the last two are kept, as a batch may span two epochs."""
        order = self._orders.get(epoch)
        if order is None:
            order = shuffled_rows(self.examples, self.seed, epoch)
            # A new dict, never one changed in place: threads may read ahead side by side.
            self._orders = dict([*list(self._orders.items())[-1:], (epoch, order)])
        return order


def _check_step(step: SupportsIndex) -> int:
    """`step` as an int >= 0."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(
            f"a step must be an integer, got {step!r} of type {type(step).__name__}; "
            "ask for one step at a time, batches[0]"
        )
    index = operator.index(step)
    if index < 0:
        raise IndexError(
            f"a step must be >= 0, got {index}; the stream of batches is endless, "
            "so it has no last one to count back from"
        )
    return index
