"""A split of examples into a training part and a test part."""

from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from backhand.data.batches import Rows, check_seed, count_examples, shuffled_rows

Arrays = dict[str, npt.NDArray[Any]]


def split_rows(examples: int, *, test_fraction: float, seed: SupportsIndex) -> tuple[Rows, Rows]:
    """The row numbers of the training and of the test part, each in ascending order."""
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"test_fraction must lie between 0 and 1, got {test_fraction}; 0.2 is usual"
        )
    test = round(examples * test_fraction)
    if not 0 < test < examples:
        raise ValueError(
            f"both parts need at least one example, got {examples - test} for training and "
            f"{test} for testing; change test_fraction={test_fraction} or bring more examples"
        )
    order = shuffled_rows(examples, check_seed(seed))
    return np.sort(order[test:]), np.sort(order[:test])


def train_test_split(
    arrays: Mapping[str, npt.ArrayLike], *, test_fraction: float, seed: SupportsIndex
) -> tuple[Arrays, Arrays]:
    """Split arrays at random into a training part and a test part.

    Args:
        arrays: arrays of one leading length N, by name.
        test_fraction: the share of the examples to test on, between 0 and 1; the number of them
            is rounded to the nearest integer.
        seed: the integer >= 0 that alone decides which examples are tested on.

    Returns:
        `(train, test)`, two dicts of copies; the rows of each are in their original order.

    Raises:
        ValueError: `arrays` is empty or its lengths disagree, `test_fraction` is out of range, or
            one of the parts would be empty.

    Example:
        >>> import numpy as np
        >>> from backhand.data import train_test_split
        >>> train, test = train_test_split({"inputs": np.arange(10)}, test_fraction=0.3, seed=0)
        >>> len(train["inputs"]), len(test["inputs"])
        (7, 3)
    """
    checked = {name: np.asarray(array) for name, array in arrays.items()}
    train, test = split_rows(count_examples(checked), test_fraction=test_fraction, seed=seed)
    return (
        {name: array[train] for name, array in checked.items()},
        {name: array[test] for name, array in checked.items()},
    )
