"""Cotangents change at one leaf, and nowhere else."""

import numpy as np

from backhand.audit.selftest.plants import leaves_of, replaced

ARGUMENTS = ({"w": np.ones((2, 3)), "b": np.ones(3)}, np.ones(4), {}, np.arange(2))
COTANGENTS = ({"w": np.full((2, 3), 2.0), "b": None}, np.full(4, 3.0), None, None)


def test_a_leaf_without_a_cotangent_is_none():
    b, w = leaves_of(ARGUMENTS, COTANGENTS)[0]
    assert b is None
    assert (w == 2).all()
    assert leaves_of(ARGUMENTS, COTANGENTS)[2:] == [[], [None]]


def test_one_leaf_is_replaced_and_the_tree_stays():
    params, x, side, ids = replaced(ARGUMENTS, COTANGENTS, {(0, 1): lambda w: -w})
    assert (params["w"] == -2).all()
    assert params["b"] is None
    assert x is COTANGENTS[1]
    assert side == {}
    assert ids is None
