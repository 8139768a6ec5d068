"""Sums that are carried on lose nothing, and large ones no memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.carried import FEW, SMALL, Carried, addable, begun, plus_each
from backhand.waiting import Unsummed


def added(terms):
    """The sum of many terms one by one, in one program."""

    def add(sums, x):
        return plus_each(sums, [x]), None

    start = [begun(terms[0], jnp.float32, 1024)]
    return jax.jit(lambda terms: jax.lax.scan(add, start, terms)[0])(terms)[0]


def test_a_thousand_terms_are_summed_as_if_they_were_one():
    values = np.random.default_rng(0).choice(np.float32([1e-3, 1, 50]), (4096, 2))
    truth = values.sum(0, dtype=float)
    one_by_one, _ = jax.lax.scan(lambda s, x: (s + x, None), jnp.zeros(2), jnp.asarray(values))
    assert np.abs(one_by_one / truth - 1).max() > 1e-6
    assert np.abs(added(jnp.asarray(values)).total / truth - 1).max() < 1e-7


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_what_is_not_finite_stays_what_it_is(bad):
    total = added(jnp.asarray([[1.0, 1.0], [bad, 1.0], [2.0, 2.0]])).total
    np.testing.assert_array_equal(total, [bad, 4.0])


def test_a_large_sum_and_one_of_few_terms_are_carried_alone_and_anyone_may_add_to_them():
    kinds = (SMALL, FEW + 1), (SMALL, FEW), (SMALL + 1, FEW + 1)
    small, *alone = (begun(jnp.zeros(n), jnp.float32, terms) for n, terms in kinds)
    assert small.lost is not None and [each.lost for each in alone] == [None, None]
    assert addable([small]) == [None] and addable(alone)[1] is alone[1].total


def test_factors_are_multiplied_before_they_are_carried():
    """A bias: what 2 examples add to it."""
    start = Carried(jnp.ones(3), jnp.zeros(3))
    (sums,) = plus_each([start], [Unsummed(bh.Total(jnp.ones((2, 3))))])
    assert sums.total.tolist() == [3.0] * 3


def test_a_term_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"one shape in all of them, got \(3,\) and \(2,\)"):
        plus_each([begun(jnp.zeros(3), jnp.float32, 2)], [jnp.ones(2)])
