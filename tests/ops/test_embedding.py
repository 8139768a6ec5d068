"""Embedding: rows by id, their blame, and ids that do not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
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


def test_an_id_outside_is_noticed():
    rows = bh.ops.embedding(jnp.ones((3, 2)), jnp.asarray([0, 3, -1, -4]))
    assert jnp.isnan(rows).all(1).tolist() == [False, True, False, True]
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
        with pytest.raises(TypeError, match=r"needs integer ids, got float32 of shape \(2,\)"):
            jax.eval_shape(bh.ops.embedding, shape((3, 2), "float32"), floats)
        with pytest.raises(ValueError, match=r"a table of shape \(V, D\), got \(3,\)"):
            jax.eval_shape(bh.ops.embedding, shape((3,), "float32"), ids)
