"""A batch in micro-batches, and what is summed and stacked on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.micro_batches import Micro, columns, joined, over, stacked


def gathered(batch, micro_batches):
    """The micro-batches, one by one."""
    split = columns(batch, micro_batches)
    return [split.part(k, k < split.longer)["x"].tolist() for k in range(split.number)]


def test_micro_batches_are_strided():
    assert gathered({"x": jnp.arange(6)}, 3) == [[0, 3], [1, 4], [2, 5]]


def test_the_first_micro_batches_have_what_is_left_over():
    assert gathered({"x": jnp.arange(8)}, 3) == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_no_micro_batch_is_empty():
    assert gathered({"x": jnp.arange(3)}, 5) == [[0], [1], [2]]
    assert gathered({"x": jnp.arange(0)}, 5) == [[]]


def test_a_view_is_taken_of_a_batch_that_divides():
    split = columns({"x": jnp.arange(6)}, 3)
    assert split.whole["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("length", [6, 7, 8])
@pytest.mark.parametrize("group", [1, 2])
def test_over_gives_sums_and_what_is_each_ones_own(length, group):
    def one(part, index, sums):
        return Micro(part.sum(), (), (index, 2 * part))

    x = jnp.arange(float(length))
    whole = over(one, x, 3, group=group)
    assert float(whole.sums) == float(x.sum()) and whole.fine.shape == (3,) and whole.fine.all()
    assert stacked([index for index, _ in whole.own]).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(joined([doubled for _, doubled in whole.own], -1), 2 * x)


def test_what_has_another_shape_in_each_micro_batch_is_refused():
    with pytest.raises(ValueError, match=r"needs one shape, got .*: reduce it over the examples"):
        stacked(over(lambda part, *_: Micro((), (), part), jnp.arange(5.0), 2).own)


@pytest.mark.parametrize("asked", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_sums_run_in_what_is_asked_for_and_in_no_less_than_what_is_summed(x64, asked):
    params = {"own": jnp.zeros((64, 64), jnp.float32)}

    def one(part, *_):
        waiting = {"own": bh.Outer(part["own"], part["own"])}
        return Micro(jax.tree.map(lambda leaf: leaf[0], part), waiting, ())

    def sums(batch):
        whole = over(one, batch, 3, params, 2, dtype=asked)
        return whole.sums, whole.products["own"]

    kinds = {"low": jnp.bfloat16, "own": jnp.float32, "high": jnp.float64, "count": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct((6, 64), kind) for name, kind in kinds.items()}
    summed, product = jax.eval_shape(sums, batch)
    wide = jnp.float64 if asked == jnp.float64 else jnp.float32
    expected = {"low": asked, "own": wide, "high": jnp.float64, "count": wide}
    assert {name: leaf.dtype for name, leaf in summed.items()} == expected
    assert product.dtype == wide


def test_what_is_dropped_is_no_part_of_a_sum():
    x = jnp.arange(6.0).at[4].set(jnp.nan)
    whole = over(lambda part, *_: Micro(part.sum(), (), ()), x, 3, drop=True)
    assert whole.fine.tolist() == [True, False, True] and float(whole.sums) == 0 + 3 + 2 + 5
