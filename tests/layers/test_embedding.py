"""Embedding and unembedding: one table, read by id and multiplied by."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import assert_backward_is_the_gradient, assert_close, initial, labels, normal


def test_the_table_begins_small():
    layer = bh.embedding(500, 64)
    params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 3), "int32"))
    assert (params["table"].shape, params["table"].dtype) == ((500, 64), jnp.float32)
    assert float(jnp.std(params["table"])) == pytest.approx(0.02, rel=0.05)
    ones = bh.unembedding(3, initializer=jax.nn.initializers.ones)
    assert (ones.init(jax.random.key(0), jnp.ones((2, 4)))["table"] == 1).all()


def test_both_have_the_gradient_of_autodiff(x64):
    ids, x = labels(0, 7, 2, 3), normal(1, 2, 3, 4)
    assert_backward_is_the_gradient(bh.embedding(7, 4), initial(bh.embedding(7, 4), ids), ids)
    assert_backward_is_the_gradient(bh.unembedding(7), initial(bh.unembedding(7), x), x)


def test_an_unembedding_scores_every_row(x64):
    x, table = normal(0, 2, 4), normal(1, 7, 4)
    assert_close(bh.unembedding(7)({"table": table}, x), x @ table.T)


def test_a_table_can_compute_in_bfloat16_and_learn_in_float32():
    layer = bh.chain(bh.embedding(7, 4), bh.cast(jnp.bfloat16), bh.unembedding(7))
    ids = labels(0, 7, 2, 3)
    params = layer.init(jax.random.key(0), ids)
    y, residuals = layer.forward(params, ids)
    grads, dx = layer.backward(params, residuals, jnp.ones_like(y))
    assert (y.dtype, dx) == (jnp.bfloat16, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_what_is_no_table_is_refused(unchecked, nothing_compiles):
    key, shape = jax.random.key(0), jax.ShapeDtypeStruct
    ids = shape((2,), "int32")
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"embedding needs at least 1 row .* got 0, 4"):
            bh.embedding(0, 4)
        with pytest.raises(ValueError, match="unembedding needs at least 1 row"):
            bh.unembedding(0)
        with pytest.raises(TypeError, match="unembedding needs floating-point input, got int32"):
            jax.eval_shape(bh.unembedding(3).init, key, ids)
        with pytest.raises(TypeError, match="embedding needs integer ids, got float32"):
            jax.eval_shape(
                bh.embedding(3, 2), {"table": shape((3, 2), "float32")}, shape((2,), "float32")
            )


def test_an_embedding_says_what_is_computed_in_after_it():
    ids = labels(0, 7, 2, 5)
    layer = bh.embedding(7, 4, dtype=jnp.bfloat16)
    params = initial(layer, ids)
    y, residuals = layer.forward(params, ids)
    assert (y.dtype, params["table"].dtype) == (jnp.bfloat16, jnp.float32)
    dparams, _ = layer.backward(params, residuals, jnp.ones_like(y))
    assert dparams["table"].dtype == jnp.float32
    with pytest.raises(TypeError, match="embedding needs a floating-point dtype, got int32"):
        bh.embedding(7, 4, dtype=jnp.int32)
