"""Lengths: which steps there are, and what is refused."""

import jax
import jax.numpy as jnp
import pytest

from backhand.ops.lengths import check_integers, check_lengths, present


def test_the_first_steps_are_there():
    assert present(jnp.array([0, 2, 5], jnp.uint8), 3).tolist() == [
        [False] * 3,
        [True, True, False],
        [True] * 3,
    ]


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, 2], TypeError, "lengths as an array of integers, got a list of 2; jnp.asarray"),
        (3, TypeError, "an array of integers, got a int"),
        (jnp.ones(2), TypeError, r"integer lengths, got float32 .* mask.sum\(1\)"),
        (jnp.ones(3, int), ValueError, r"lengths of shape \(B,\) = \(2,\), got \(3,\)"),
        (jnp.array([5, 2]), ValueError, r"lengths from 0 to 4, the steps of x; got 5 at \[0\]"),
        (jnp.array([0, -1]), ValueError, r"lengths from 0 to 4, the steps of x; got -1 at \[1\]"),
    ],
)
def test_what_are_no_lengths_is_refused(lengths, error, message, unchecked):
    with pytest.raises(error, match=f"op needs .*{message}"):
        check_lengths("op", lengths, 2, 4, "the steps of x")


def test_lengths_that_are_not_known_yet_pass():
    def run(lengths):
        check_lengths("op", lengths, 2, 4, "the steps of x")
        return present(lengths, 4)

    assert jax.jit(run)(jnp.array([9, 0])).tolist() == [[True] * 4, [False] * 4]
    check_integers("op", "segments", jnp.zeros((2, 3), jnp.int16), (2, 3), "B, T")
