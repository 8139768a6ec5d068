"""Sums and inner products of contributions are those of explicit per-example gradients."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import backhand as bh
from backhand.contributions import inner_products, map_owners, scaled, total
from tests.support import assert_close, labels, normal

B, I, O = 4, 3, 2  # noqa: E741


def explicit(contribution, param):
    """The gradient (B, *param.shape) of each example, by loops."""
    gradients = np.zeros((B, *param.shape))
    match contribution:
        case bh.Many(parts):
            return sum(explicit(part, param) for part in parts if part is not None)
        case bh.Outer(x, dy):
            for place in np.ndindex(*x.shape[:-1]):
                gradients[place[0]] += np.outer(x[place], dy[place])
        case bh.Rows(ids, dy):
            for place in np.ndindex(*ids.shape):
                gradients[place[0], ids[place]] += dy[place]
        case bh.Total(dy, rank):
            for place in np.ndindex(*dy.shape[: dy.ndim - rank]):
                gradients[place[0], : dy.shape[-rank]] += dy[place]
    return gradients


def outer(seed, *time):
    return bh.Outer(normal(seed, B, *time, I), normal(seed + 1, B, *time, O))


def rows(seed, *time):
    return bh.Rows(labels(seed, I, B, *time), normal(seed + 1, B, *time, O))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Windows of a kernel of one over one spatial axis: the weight (1, I, O) of a linear map."""

    rank: int = 1

    def __call__(self, x, dy, kernel):
        assert x.ndim == dy.ndim == 3
        return jnp.einsum("bti,bto->io", x, dy)[None]


CONTRIBUTIONS = {
    "outer": lambda: outer(0),
    "outer in time": lambda: outer(0, 5),
    "outer in space": lambda: outer(0, 2, 3),
    "rows": lambda: rows(0, 5),
    "rows of one": lambda: rows(0),
    "total of a matrix": lambda: bh.Total(normal(0, B, 5, I, O), rank=2),
    "total of the rows that were read": lambda: bh.Total(normal(0, B, 5, I - 1, O), 2, unread=1),
    "totals of all rows and of some": lambda: bh.Many(
        (bh.Total(normal(0, B, I, O), 2), bh.Total(normal(1, B, I - 1, O), 2, unread=1))
    ),
    "tied": lambda: bh.Many((rows(0, 5), outer(2, 5))),
    "tied thrice": lambda: bh.Many((outer(0), None, outer(2, 4), rows(4))),
    "of one step": lambda: bh.Many((outer(0), outer(2), outer(4))),
}


@pytest.mark.parametrize("name", CONTRIBUTIONS)
def test_sums_and_norms_are_those_of_each_examples_gradient(x64, name):
    contribution, param = CONTRIBUTIONS[name](), jnp.zeros((I, O))
    each = explicit(contribution, param)

    @jax.jit
    def run(contribution):
        return total(contribution, param), inner_products(contribution, contribution, param)

    found = run(contribution)
    assert_close(found, (jnp.asarray(each.sum(0)), jnp.asarray((each**2).sum((1, 2)))))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), contribution)
    if not isinstance(contribution, bh.Rows | bh.Many):
        sums, norms = jax.jit(
            lambda c: (total(c, jnp.zeros((2, I, O))), inner_products(c, c, jnp.zeros((2, I, O))))
        )(stacked)
        assert (sums.shape, norms.shape) == ((2, I, O), (2, B))
        assert_close((sums[0], norms[0]), found)


def test_windows_are_summed_by_their_product_whatever_axes_are_in_front(x64):
    c, param = outer(0, 5), jnp.zeros((1, I, O))
    windows, each = bh.Windows(c.x, c.dy, Pairs()), explicit(c, jnp.zeros((I, O)))
    found = total(windows, param), inner_products(windows, windows, param)
    expected = jnp.asarray(each.sum(0)[None]), jnp.asarray((each**2).sum((1, 2)))
    assert_close(found, expected)
    in_two = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), windows)
    assert_close(in_two.sum(param), expected[0])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), windows)
    deep = jnp.zeros((2, 1, I, O))
    assert_close(total(stacked, deep)[1], 4 * expected[0])
    assert_close(inner_products(stacked, stacked, deep)[1], 16 * expected[1])
    twice = scaled(windows, jnp.full(B, 2.0), param)
    assert_close(total(twice, param), 2 * expected[0])


@given(st.sampled_from(["", "in time"]), st.integers(0, 3))
@settings(max_examples=6)
def test_inner_products_of_two_contributions_are_symmetric_and_bilinear(time, seed):
    with jax.enable_x64(True):
        time = (3,) if time else ()
        param = jnp.zeros((I, O))
        a, b = outer(seed, *time), rows(seed + 7, *time)
        ab, ba = inner_products(a, b, param), inner_products(b, a, param)
        assert_close(ab, ba)
        expected = (explicit(a, param) * explicit(b, param)).sum((1, 2))
        assert_close(ab, jnp.asarray(expected))
        both = bh.Many((a, b))
        assert_close(
            inner_products(both, both, param),
            inner_products(a, a, param) + 2 * ab + inner_products(b, b, param),
        )


def test_a_bias_sums_over_every_axis_before_its_own(x64):
    dy = normal(0, B, 2, 3, O)
    bias = jnp.zeros(O)
    assert_close(total(bh.Total(dy), bias), dy.sum((0, 1, 2)))
    norms = inner_products(bh.Total(dy), bh.Total(dy), bias)
    assert_close(norms, (dy.sum((1, 2)) ** 2).sum(-1))


@pytest.mark.parametrize("batch", [2, 3, 70])
def test_a_wide_sum_is_that_of_its_rows_in_groups(x64, monkeypatch, batch):
    monkeypatch.setattr("backhand.arrays.WIDE", 1)
    monkeypatch.setattr("backhand.arrays.FEW", 4)
    dy = normal(0, batch, I, O).at[0, 0, 0].set(jnp.inf).at[1, 0, 1].set(jnp.nan)

    def whole(dy):
        return total(bh.Total(dy, rank=2), jnp.zeros((I, O)))

    assert "slice" not in str(jax.make_jaxpr(whole)(dy))  # rows that devices have may not be cut
    monkeypatch.setattr("jax.local_device_count", lambda platform: 1)
    found = whole(dy)
    np.testing.assert_allclose(found, np.asarray(dy).sum(0), rtol=1e-12)
    assert_close(total(bh.Total(dy[:, 1:]), jnp.zeros(O)), dy[:, 1:].sum((0, 1)))


def test_sums_have_the_dtype_of_the_parameter_and_the_accuracy_of_float32():
    """A bfloat16 sum of 4096 equal numbers stops at 256 of them."""
    dy = jnp.ones((4096, O), jnp.bfloat16)
    for contribution, param in (
        (bh.Total(dy), jnp.zeros(O)),
        (bh.Outer(jnp.ones((4096, I), jnp.bfloat16), dy), jnp.zeros((I, O))),
        (bh.Rows(jnp.zeros(4096, jnp.int32), dy), jnp.zeros((1, O))),
        (bh.Many((bh.Total(dy), bh.Total(dy))), jnp.zeros(O, jnp.bfloat16)),
    ):
        found = total(contribution, param)
        uses = 2 if isinstance(contribution, bh.Many) else 1
        assert (found.dtype, found.shape) == (param.dtype, param.shape)
        assert (found == 4096 * uses).all()


def test_a_rule_may_give_the_gradient_itself_or_none():
    param = jnp.ones((I, O), jnp.bfloat16)
    plain = total(jnp.full((I, O), 2.0), param)
    assert (plain.dtype, float(plain[0, 0])) == (jnp.bfloat16, 2)
    assert not total(None, param).any()
    running = bh.Running(jnp.ones(2), jnp.ones(2), 0.5)
    moments = bh.Moments(jnp.ones(()), jnp.ones(2), jnp.ones(2))
    assert_close(total(moments, running), bh.Running(jnp.zeros(2), jnp.zeros(2), 0.5), 0)


def test_owners_are_parameters_and_running_statistics_as_a_whole():
    params = {"w": jnp.ones(2), "r": bh.Running(jnp.ones(1), jnp.ones(1)), "empty": ()}
    names = map_owners(
        lambda param, c: (type(param).__name__, c), params, {"w": 1, "r": 2, "empty": ()}
    )
    assert names["r"] == ("Running", 2)
    assert names["w"][1] == 1


def test_contributions_that_do_not_fit_are_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    x, param = shape((B, I), "float32"), shape((I, O + 1), "float32")
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"the shape of its primal \(3, 3\), got \(3, 2\)"):
            jax.eval_shape(total, bh.Outer(x, shape((B, O), "float32")), param)
        for wrong in (x, None):
            with pytest.raises(
                TypeError, match=r"batch axis \(Outer, Total, Rows or Windows\), got"
            ):
                jax.eval_shape(lambda c: inner_products(c, c, param), wrong)
