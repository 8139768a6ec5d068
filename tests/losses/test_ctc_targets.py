"""What CTC is told: how it is read, and what is refused on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.losses.ctc_targets import read
from tests.losses.test_ctc import CTC, T, V, targets


def test_an_example_fits_if_there_are_frames_for_labels_and_blanks_between_equal_ones():
    known = targets([[1, 2, 3], [2, 2, 2], [1, 1, 0], [0, 0, 0]], [3, 3, 2, 0], [3, 4, 3, 0])
    found = read(jnp.zeros((4, T, V)), known, 0)
    assert found.fits.tolist() == [True, False, True, True]
    assert found.skips.tolist()[:2] == [[False, True, True], [False, False, False]]
    assert found.valid.all() and found.counts.tolist() == found.fits.tolist()


def test_what_means_nothing_counts_so_that_it_is_noticed():
    known = targets([[1, 2, 3], [V, 1, 0], [1, 0, 0]], [4, 2, 1], [3, 1, -1])
    found = read(jnp.zeros((3, T, V)), known, 0)
    assert not found.valid.any() and not found.fits.any() and found.counts.all()


def test_labels_longer_than_the_frames_are_refused_where_they_are_known():
    logits = jax.ShapeDtypeStruct((2, T, V), "float32")

    def host(labels, lengths, frames):
        return {name: np.asarray(x) for name, x in targets(labels, lengths, frames).items()}

    good = host([[1, 2, 3], [1, 0, 0]], [3, 1], [3, 5])
    CTC.check(logits, good, None)
    long = host([[1, 2, 3], [2, 2, 0]], [3, 2], [3, 2])
    with pytest.raises(ValueError, match=r"\[1\] needs 3 frames, for 2 labels and 1 blanks"):
        CTC.check(logits, long, None)
    CTC.check(logits, long, np.asarray([1.0, 0.0]))
    CTC.check(logits, {name: jnp.asarray(x) for name, x in long.items()}, None)
    for wrong, message in (
        (host([[1, 2, 3], [1, 0, 0]], [4, 1], [5, 5]), r"label_lengths .* \[0, 3\].* got 4 at"),
        (host([[1, 2, 3], [1, 0, 0]], [3, 1], [5, 6]), r"input_lengths .* got 6 at \[1\]"),
        (host([[1, 2, 4], [1, 0, 0]], [3, 1], [5, 5]), r"\[0, 4\), .* got 4 at \[0, 2\]"),
        (host([[1, 2, 3], [1, 0, 0]], [-1, 1], [5, 5]), "got -1 at"),
    ):
        with pytest.raises(ValueError, match=message):
            CTC.check(logits, wrong, None)
    with pytest.raises(ValueError, match=r"not be blank, 2; got 2 at \[0, 1\]"):
        CTC.bind(blank=2).check(logits, good, None)


def test_an_objective_refuses_lengths_before_anything_compiles(nothing_compiles):
    loss = bh.objective(bh.dense(V), CTC)
    wrong = {name: np.asarray(x) for name, x in targets([[1, 2, 3]], [4], [5]).items()}
    batch = {"inputs": np.zeros((1, T, 2), np.float32), "targets": wrong}
    key = jax.random.key(0)
    with nothing_compiles(), pytest.raises(ValueError, match=r"label_lengths .* got 4 at \[0\]"):
        loss.init(key, batch)


def test_labels_that_are_lists_are_refused_in_words(unchecked):
    with pytest.raises(TypeError, match=r"ctc needs targets\['labels'\] as an array, got a list"):
        CTC(jnp.zeros((1, T, V)), {"labels": [[1]]})
    with pytest.raises(TypeError, match=r"differ, .*; got an array of shape \(1, 2\)"):
        CTC(jnp.zeros((1, T, V)), jnp.ones((1, 2), jnp.int32))
