"""All heads in turn or at once: the same numbers, whatever is shared among them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from backhand.ops.attention_blocks import Head, Scores, backward_head, forward_head
from backhand.ops.attention_heads import at_once, in_turn
from tests.support import assert_close, normal

HOW = Scores(True, None, 0.5, None, "float64", "float64")
BATCH, KEY_HEADS, TOKENS, GROUP, FEATURES = 2, 3, 5, 2, 4


def of_head(head, do):
    o, normalizers = forward_head(head, rows=2, how=HOW)
    dq, dk, dv, dbias = backward_head(head, normalizers, do, rows=2, how=HOW)
    return (o, dq, dk, dv), dbias


def heads(bias):
    lead = (BATCH, TOKENS, KEY_HEADS)
    q, do = (normal(i, *lead, GROUP, FEATURES) for i in (0, 1))
    k, v = (normal(i, *lead, FEATURES) for i in (2, 3))
    bias = None if bias is None else normal(4, *bias, GROUP, TOKENS, TOKENS)
    mask = jnp.asarray([[[True] * 4 + [False]], [[True] * 5]])
    return Head(q, k, v, bias, mask, None, None), do


SIZES = [(None, 1), (None, 4), (None, 100), ((2, 3), 2), ((1, 3), 1), ((2, 1), 1), ((1, 1), 4)]


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(("bias", "size"), SIZES)
def test_in_turn_and_at_once_are_the_same(bias, size, sliced, x64):
    head, do = heads(bias)

    @jax.jit
    def run(head, do):
        one_by_one = in_turn(of_head, head, do, size=size, sliced=sliced)
        return at_once(of_head, head, do), one_by_one

    together, one_by_one = run(head, do)
    assert_close(one_by_one, together)
    assert bias is None or together[1].shape == head.bias.shape


def test_heads_whose_blocks_are_sliced_are_mapped_over(x64):
    """The way back of a map, by automatic differentiation, does not add up whole arrays."""
    head, do = heads(None)
    run = functools.partial(in_turn, of_head, size=1, sliced=True)
    (scan,) = (e for e in jax.make_jaxpr(run)(head, do).eqns if e.primitive.name == "scan")
    assert max(aval.ndim for aval in scan.params["jaxpr"].in_avals) == 3  # (T, G, D) of one head


@pytest.mark.parametrize("bias", [(1, 3), (2, 1), (1, 1)])
def test_the_error_of_a_shared_bias_is_the_sum_of_its_copies(bias, x64):
    head, do = heads(bias)
    copied = jnp.broadcast_to(head.bias, (BATCH, KEY_HEADS, *head.bias.shape[2:]))
    run = jax.jit(lambda head, do: at_once(of_head, head, do)[1])
    each = run(head._replace(bias=copied), do)
    shared = [axis for axis in (0, 1) if bias[axis] == 1]
    assert_close(run(head, do), each.sum(shared, keepdims=True))


def test_a_function_without_an_error_of_the_bias_gives_none(x64):
    head, _ = heads((1, 3))

    def forward(head):
        return forward_head(head, rows=2, how=HOW), None

    y, dbias = in_turn(forward, head, size=1, sliced=True)
    assert dbias is None
    assert_close(y, at_once(forward, head)[0])


def test_no_examples_give_no_error(x64):
    head, do = heads((1, 3))
    none = jax.tree.map(lambda x: x[:0] if x.shape[0] == BATCH else x, head)
    for each in (at_once, functools.partial(in_turn, size=1, sliced=False)):
        (o, *_), dbias = each(of_head, none, do[:0])
        assert o.shape == (0, *do.shape[1:])
        assert dbias.shape == head.bias.shape and not dbias.any()
