"""Embedding: rows by id, their blame, and ids that do not exist."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import backhand as bh
from tests.conformance.checks import both_sides
from tests.support import assert_close, labels, normal


def test_a_row_is_blamed_for_every_place_that_read_it(x64):
    table, ids = normal(0, 5, 3), jnp.asarray([[1, 1, 4], [1, 0, 4]])
    y, residuals = bh.ops.embedding.forward(table, ids)
    dy = normal(1, 2, 3, 3)
    dtable, _ = bh.ops.embedding.backward(residuals, dy)
    assert_close(y, table[ids])
    onehot = jax.nn.one_hot(ids, 5, dtype=dy.dtype)
    assert_close(dtable, jnp.einsum("btv,btd->vd", onehot, dy))
    assert not dtable[2:4].any()


COMPILED = jax.jit(lambda arguments, dy: both_sides(bh.ops.embedding, arguments, dy))


@given(
    st.sampled_from([(4,), (2, 3), (1, 1, 6)]),
    st.sampled_from([(5, 3), (300, 1)]),
    st.lists(st.integers(-5, 4), min_size=6, max_size=6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_any_ids_give_the_references_rows_and_blame(shape, table, drawn, seed):
    with jax.enable_x64(True):
        ids = jnp.asarray(drawn[: np.prod(shape)], jnp.int32).reshape(shape)
        dy = normal(seed, *shape, table[1])
        assert_close(*COMPILED((normal(seed + 1, *table), ids), dy))


def test_an_id_outside_is_refused_where_it_is_known_and_noticed_where_it_is_not():
    table, ids = jnp.ones((3, 2)), jnp.asarray([0, 3, -1, -4])
    rows = jax.jit(bh.ops.embedding)(table, ids)
    assert jnp.isnan(rows).all(1).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"ids from -3 to 2, for a table of 3 rows; got -4 at"):
        bh.ops.embedding(table, ids)
    with pytest.raises(ValueError, match=r"got 3 at \[1\]"):
        bh.embedding(3, 2)({"table": table}, np.asarray([0, 3]))
    assert_close(bh.ops.embedding(jnp.eye(3), jnp.asarray([-1]))[0], jnp.eye(3)[2])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_ids_may_be_any_integers(dtype):
    ids = labels(0, 5, 4).astype(dtype)
    table = normal(0, 5, 2)
    assert_close(bh.ops.embedding(table, ids), table[np.asarray(ids, int)])
    assert bh.ops.embedding(table.astype(jnp.bfloat16), ids).dtype == jnp.bfloat16


def test_a_bfloat16_error_is_summed_in_float32():
    ids = jnp.zeros(4096, jnp.int32)
    _, residuals = bh.ops.embedding.forward(jnp.zeros((2, 1)), ids)
    dtable, _ = bh.ops.embedding.backward(residuals, jnp.ones((4096, 1), jnp.bfloat16))
    assert dtable[:, 0].tolist() == [4096, 0]


def test_what_is_no_id_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    ids, floats = shape((2,), "int32"), shape((2,), "float32")
    with nothing_compiles():
        with pytest.raises(TypeError, match="ids as an array of integers, got a list of 2; jnp"):
            jax.eval_shape(bh.ops.embedding, floats, [0, 1])
        with pytest.raises(TypeError, match=r"needs integer ids, got float32 of shape \(2,\)"):
            jax.eval_shape(bh.ops.embedding, shape((3, 2), "float32"), floats)
        with pytest.raises(ValueError, match=r"a table of shape \(V, D\), got \(3,\)"):
            jax.eval_shape(bh.ops.embedding, shape((3,), "float32"), ids)
