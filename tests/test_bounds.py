"""Integers in a range: refused where they are known, noted where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backhand.bounds import Bounds, need_within, noted


def ask(x, low=-3, high=2):
    need_within("this needs ids", x, low, high, "for a table of 3 rows")


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_what_is_outside_is_refused_where_it_is_known(make):
    ask(make([[0, 2], [-3, 1]]))
    ask(make([], int))
    message = r"this needs ids from -3 to 2, for a table of 3 rows; got {} at \[1, 0\]"
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=message.format(wrong)):
            ask(make([[0, 2], [wrong, 1]]))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64"])
def test_any_integers_will_do(dtype):
    ask(np.asarray([0, 120], dtype), -300, 200)
    with pytest.raises(ValueError, match=r"got 120 at \[1\]"):
        ask(np.asarray([0, 120], dtype), -300, 100)


def test_known_ones_are_refused_while_others_are_traced():
    def run(x):
        ask(jnp.asarray(np.asarray([7])) if isinstance(x, int) else np.asarray([7]))
        return x

    with pytest.raises(ValueError, match="got 7"):
        jax.jit(run)(jnp.ones(2))


def test_what_is_asked_of_a_traced_array_is_noted_of_that_array_alone():
    found = []

    def run(tree):
        with noted(tree) as asked:
            ask(tree["ids"])
            ask(jnp.asarray(tree["ids"]), 0, 9)
            ask(tree["lengths"] + 1)
            jax.lax.scan(lambda c, x: (c, ask(tree["lengths"], 0, 5)), 0, jnp.arange(2))
        found[:] = asked
        ask(tree["ids"], 0, 0)

    ids, lengths = np.zeros((2, 3), int), np.zeros(2, int)
    jax.eval_shape(run, {"ids": ids, "lengths": lengths})
    why = ("this needs ids", "for a table of 3 rows")
    of = lambda low, high: Bounds(why[0], low, high, why[1])  # noqa: E731
    assert [set(own) for own in found] == [{of(-3, 2), of(0, 9)}, {of(0, 5)}]
