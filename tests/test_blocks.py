"""Adding to a sum, whole or in blocks, is adding the gradient."""

import functools

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.blocks import added, plus
from backhand.contributions import total
from tests.support import assert_close, labels, normal, temporary_bytes


@pytest.mark.parametrize("depth", [(), (3,), (2, 2)])
@pytest.mark.parametrize("kind", ["outer", "total", "rows", "many"])
def test_adding_stacked_contributions_is_adding_their_gradients(x64, kind, depth):
    group, batch, inputs, outputs = 4, 5, 20, 7
    lead = (group, *depth, batch)
    weight = normal(0, *depth, inputs, outputs)
    outer = bh.Outer(normal(1, *lead, inputs), normal(2, *lead, outputs))
    param, waiting = {
        "outer": (weight, outer),
        "total": (weight[..., 0, :], bh.Total(normal(2, *lead, outputs))),
        "rows": (weight, bh.Rows(labels(3, inputs, *lead), normal(2, *lead, outputs))),
        "many": (weight, bh.Many((outer, jax.tree.map(lambda leaf: leaf / 2, outer)))),
    }[kind]
    start = normal(4, *param.shape)
    each = [total(jax.tree.map(lambda leaf, g=g: leaf[g], waiting), param) for g in range(group)]
    ours = jax.jit(functools.partial(added, block=32))(start, waiting, param)
    assert_close(ours, start + functools.reduce(jnp.add, each))


@pytest.mark.parametrize("inputs", [20, 1, 23], ids=["divides", "one row", "prime"])
def test_blocks_cover_every_row_once(x64, inputs):
    param = normal(0, inputs, 7)
    outer = bh.Outer(normal(1, 5, inputs), normal(2, 5, 7))
    ours = jax.jit(functools.partial(plus, block=32))(param, outer, param)
    assert_close(ours, param + total(outer, param))


def test_what_has_no_gradient_changes_no_sum():
    start = normal(0, 3)
    assert plus(start, None, start) is start


def test_a_large_weight_is_added_to_without_a_second_one():
    weight = jnp.zeros((512, 512))
    outer = bh.Outer(jnp.ones((4, 512)), jnp.ones((4, 512)))

    def run(start, outer):
        return plus(2 * start, outer, start, weight.size // 4)

    assert temporary_bytes(run, weight, outer) < weight.nbytes / 2
