"""Leaves come in the order in which the model has its layers."""

import jax

import backhand as bh
from backhand.audit.order import in_model_order
from tests.support import normal


def test_leaves_come_in_the_order_of_the_model():
    layer = bh.chain(
        z=bh.dense(4),
        y=bh.repeat(bh.skip(bh.chain(b=bh.dense(4), a=bh.dense(4))), 2),
        x=bh.dense(3),
    )
    params = jax.eval_shape(layer.init, jax.random.key(0), normal(0, 2, 6))
    own = ["z/b", "z/w", "y/b/b", "y/b/w", "y/a/b", "y/a/w", "x/b", "x/w"]
    assert [path for path, _ in in_model_order(layer, params)] == own
    tied = bh.share(layer, {"y/a": "y/b"})
    params = jax.eval_shape(tied.init, jax.random.key(0), normal(0, 2, 6))
    paths = [path for path, _ in in_model_order(tied, params)]
    assert paths == ["z/b", "z/w", "y/b/b", "y/b/w", "x/b", "x/w"]


def test_what_has_no_parts_keeps_its_own_order():
    assert [path for path, _ in in_model_order(None, {"b": 1, "a": (2, 3)})] == ["a/0", "a/1", "b"]
    assert [path for path, _ in in_model_order(bh.dense(1), 1.0)] == [""]
