"""The digits: what their docstring says of them."""

import sys

import numpy as np
import pytest

from backhand.data import digits


def test_the_digits_are_images_in_zero_to_one_and_their_classes():
    pytest.importorskip("sklearn")
    data = digits()
    assert list(data) == ["inputs", "targets"]
    assert data["inputs"].shape == (1797, 64)
    assert data["inputs"].dtype == np.float32
    assert data["inputs"].min() == 0
    assert data["inputs"].max() == 1
    assert data["targets"].shape == (1797,)
    assert data["targets"].dtype == np.int32
    assert set(data["targets"].tolist()) == set(range(10))


def test_a_zero_has_a_hole_where_a_one_has_ink():
    pytest.importorskip("sklearn")
    data = digits()
    centre = data["inputs"].reshape(-1, 8, 8)[:, 3:5, 3:5].mean(axis=(1, 2))
    assert centre[data["targets"] == 0].mean() < 0.2 < 0.7 < centre[data["targets"] == 1].mean()


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "backhand\[examples\]"'):
        digits()
