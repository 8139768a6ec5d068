"""What was used last is remembered, and no more than that."""

import functools
from importlib import import_module

import numpy as np

import backhand as bh
from backhand.recent import Recent
from tests.support import labels, normal


def test_the_key_that_was_not_used_for_longest_is_forgotten():
    known = Recent(2)
    assert known.find("a") is None
    assert [known.keep(key, value) for key, value in (("a", 1), ("b", 2))] == [1, 2]
    assert known.find("a") == 1
    known.keep("c", 3)
    assert [known.find(key) for key in "abc"] == [1, None, 3]
    known.keep("a", 4)
    known.keep("d", 5)
    assert [known.find(key) for key in "acd"] == [4, None, 5]


def test_an_objective_traces_a_shape_once_and_remembers_no_more_than_so_many(monkeypatch):
    traces = []

    def forward(params, x):
        traces.append(x.shape)
        return x @ params, x

    def backward(params, x, dy):
        return bh.Outer(x, dy), dy @ params.T

    monkeypatch.setattr(import_module("backhand.gradients"), "Recent", functools.partial(Recent, 2))
    layer = bh.layer("linear", lambda key, x: np.ones((4, 3), np.float32), forward, backward)
    loss = bh.objective(layer, bh.losses.softmax_cross_entropy)

    def meet(rows):
        before = len(traces)
        loss.check(np.ones((4, 3)), {"inputs": normal(0, rows, 4), "targets": labels(1, 3, rows)})
        return len(traces) - before

    assert [meet(rows) > 0 for rows in (1, 1, 2, 1, 3, 1, 2)] == [1, 0, 1, 0, 1, 0, 1]
