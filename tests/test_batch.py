"""A batch that cannot be right is refused in words, before anything compiles."""

import numpy as np
import pytest

from backhand.batch import check_batch

X, Y = np.ones((4, 3)), np.ones(4)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([X, Y], TypeError, "a batch is a dict with 'inputs' and 'targets', got list"),
        ({"inputs": X}, ValueError, "a batch needs 'targets', got 'inputs'"),
        ({"inputs": X, "targets": Y, "weight": Y}, ValueError, "'weight'.* did you mean 'weights'"),
        ({"inputs": X, "targets": Y[:3]}, ValueError, r"one common first axis, got \['inputs'\]"),
        (
            {"inputs": [[1.0, 2.0]] * 4, "targets": Y},
            TypeError,
            r"batch\['inputs'\] must be an array, got a list of numbers: .* np\.asarray",
        ),
        ({"inputs": X, "targets": 2.0}, ValueError, r"\['targets'\]: a scalar"),
    ],
)
def test_what_is_wrong_is_named(unchecked, batch, error, message):
    with pytest.raises(error, match=message):
        check_batch(batch)


def test_names_that_the_model_takes_and_trees_of_arrays_are_fine():
    check_batch({"inputs": [X, {"y": Y}], "mask": Y}, frozenset({"mask"}), has_targets=False)
