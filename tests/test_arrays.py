"""Dtype, sharding and varying mesh axes of a cotangent; training on meshes of eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import backhand as bh
from backhand.arrays import (
    accumulation_dtype,
    at_least,
    contract,
    inverse,
    is_floating,
    last_axis,
    like_primal,
    outer,
    outer_product,
    upcast,
)
from tests.support import assert_close, labels, normal, spread, temporary_bytes

P = PartitionSpec


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float32"], "float32"),
        (["bfloat16", "float64"], "float64"),
        (["int32"], "float32"),
    ],
)
def test_sums_run_in_at_least_float32(x64, dtypes, expected):
    assert accumulation_dtype(*dtypes) == jnp.dtype(expected)
    assert upcast(jnp.zeros(2, dtypes[-1])).dtype == accumulation_dtype(dtypes[-1])
    assert at_least(dtypes[-1], jnp.float32) == jnp.dtype(expected)


def test_only_floating_point_has_a_cotangent():
    floating = {"float32": True, "bfloat16": True, "int32": False, "bool": False, "uint8": False}
    for dtype, expected in floating.items():
        assert is_floating(jax.ShapeDtypeStruct((), dtype)) is expected
    assert not is_floating(jax.random.key(0))


def test_settings_that_are_text_are_refused(unchecked, nothing_compiles):
    x, rows = jax.ShapeDtypeStruct((2, 4, 2, 6), "float32"), jax.ShapeDtypeStruct((3, 4), "float32")
    ids = jax.ShapeDtypeStruct((3,), "int32")
    trunk = bh.embedding(8, 4)
    with nothing_compiles():
        for op, given, named in (
            (bh.ops.gelu.bind(approximate="tanh"), (x,), "gelu's approximate must be True"),
            (bh.ops.attention.bind(causal="no"), (x, x, x), "attention's causal must be True"),
            (bh.ops.average_pool.bind(window=2, count_padding="no"), (x,), "count_padding must be"),
            (bh.ops.average_pool.bind(window="2"), (x,), "a window of integers, got '2'"),
            (bh.losses.info_nce.bind(temperature="1"), (rows, rows), "temperature must be a num"),
            (bh.losses.softmax_focal.bind(gamma="2"), (rows, ids), "gamma must be a number"),
        ):
            with pytest.raises(TypeError, match=named):
                jax.eval_shape(op, *given)
        with pytest.raises(TypeError, match="embedding's features must be a whole number, got"):
            bh.embedding(20, 8.5)
        with pytest.raises(TypeError, match="vocabulary must be a whole number, got '8'"):
            bh.linear_cross_entropy_objective(trunk, "8")
        with pytest.raises(TypeError, match=r"tied must be the path of a table, .* got True"):
            bh.linear_cross_entropy_objective(trunk, 8, tied=True)
        loss = bh.objective(bh.dense(2), bh.losses.mean_squared_error)
        with pytest.raises(TypeError, match="training must be True or False, got 'no'"):
            bh.value_and_grad(loss)({}, {}, training="no")


def test_the_inverse_of_nothing_is_zero_without_a_gradient():
    assert inverse(jnp.asarray([0.0, 4.0])).tolist() == [0, 0.25]
    assert jax.grad(lambda w: inverse(w).sum())(jnp.asarray([0.0, 2.0])).tolist() == [0, -0.25]


def test_last_axis_meets_any_rank_without_rank_promotion():
    v = jnp.arange(3.0)
    for shape in ((3,), (2, 3), (4, 2, 3)):
        assert (jnp.zeros(shape) + last_axis(v, jnp.zeros(shape))).shape == shape


def test_a_product_of_bfloat16_accumulates_in_float32():
    a, b = (jnp.full(4096, value, jnp.bfloat16) for value in (1.0, 1 / 256))
    like = jnp.zeros(())
    assert float(contract(a, b, ((0,), (0,)), like)) == 16
    assert contract(a, b, ((0,), (0,)), like.astype(jnp.float16)).dtype == jnp.float16


@pytest.fixture
def one_device(monkeypatch):
    """Where leading axes are not split, sums of them may be taken as one."""
    monkeypatch.setattr("jax.local_device_count", lambda platform: 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(4, 6), (0, 6), (4, 0), (256, 257)])
def test_the_outer_product_sums_over_all_leading_axes(sizes, dtype, one_device):
    x, dy = (normal(seed, 3, 5, 7, own).astype(dtype) for seed, own in enumerate(sizes))
    found = outer(x, dy, jnp.zeros(sizes))
    wide = (np.asarray(a, np.float64) for a in (x, dy))
    assert found.dtype == jnp.float32
    assert_close(found, np.float32(np.einsum("abci,abco->io", *wide)), 1e-6)


@pytest.mark.parametrize(
    ("x", "outputs", "turned"),
    [((8, 64, 32), 16, False), ((8, 64, 256), 256, False), ((8, 512, 64), 64, True)],
)
def test_large_and_small_outer_products_turn_no_copy_of_their_input(x, outputs, turned, one_device):
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in (x, (*x[:-1], outputs))]
    assert (temporary_bytes(outer_product, *arrays) >= np.prod(x) * 4) == turned


def test_outer_products_of_low_precision_keep_their_axes(one_device):
    for dtype, as_rows in (("float32", True), ("bfloat16", False)):
        x = jax.ShapeDtypeStruct((8, 64, 256), dtype)
        assert ("reshape" in str(jax.make_jaxpr(outer_product)(x, x))) == as_rows


def test_an_outer_product_gathers_no_time_axis_that_the_compiler_split():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P(None, "d"))
    x, dy = (jax.ShapeDtypeStruct((8, 64, n), "float32", sharding=split) for n in (32, 16))
    assert "all-gather" not in jax.jit(outer_product).lower(x, dy).compile().as_text()


def test_a_cotangent_of_another_shape_is_refused(nothing_compiles):
    shapes = (jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3,), "float32"))
    with nothing_compiles(), pytest.raises(ValueError, match=r"primal \(3,\), got \(2, 3\)"):
        jax.eval_shape(like_primal, *shapes)


# Meshes -------------------------------------------------------------------------------------------

BATCH = {
    "inputs": labels(0, 11, 16, 3),
    "targets": labels(1, 11, 16, 3),
    "weights": jnp.arange(16.0),
}


def everything():
    """Every kind of contribution, repeated and tied."""
    block = bh.skip(bh.chain(norm=bh.layer_norm(), up=bh.dense(8), act=bh.relu(), down=bh.dense(6)))
    return bh.share(
        bh.chain(
            tokens=bh.embedding(11, 6),
            norm=bh.batch_norm(),
            blocks=bh.repeat(bh.checkpoint(block), 2),
            drop=bh.dropout(0.1),
            logits=bh.unembedding(11),
        ),
        {"logits/table": "tokens/table"},
    )


METRICS = {"accuracy": bh.metrics.accuracy}
OBJECTIVE = bh.objective(everything(), bh.losses.softmax_cross_entropy, metrics=METRICS)


@functools.cache
def parameters():
    return spread(OBJECTIVE.init(jax.random.key(0), BATCH))


@functools.cache
def on_one_device():
    key = jax.random.key(1)
    both = bh.value_and_collect(OBJECTIVE, gradients=bh.gradients, norms=bh.square_norms)
    return jax.jit(both)(parameters(), BATCH, key=key)


def meshes():
    explicit = jax.make_mesh((8,), ("data",))
    assert AxisType.Explicit in explicit.axis_types
    return {"explicit": explicit, "auto": jax.make_mesh((8,), ("data",), (AxisType.Auto,))}


def placed(mesh):
    """Parameters on every device, the batch spread over them."""
    params = jax.device_put(parameters(), NamedSharding(mesh, P()))
    return params, jax.device_put(BATCH, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_gradients_of_a_sharded_batch_are_those_of_the_batch(kind):
    params, batch = placed(meshes()[kind])
    both = bh.value_and_collect(OBJECTIVE, gradients=bh.gradients, norms=bh.square_norms)
    value, collected = jax.jit(both)(params, batch, key=jax.random.key(1))
    assert_close((value, collected), on_one_device(), 2e-5, floor=1e-6)
    for grad, param in zip(
        jax.tree.leaves(collected["gradients"]), jax.tree.leaves(params), strict=True
    ):
        assert grad.sharding.is_equivalent_to(param.sharding, param.ndim)


def test_a_comparison_on_a_mesh_agrees():
    params, batch = placed(meshes()["explicit"])
    bh.compare(OBJECTIVE, params, batch, key=jax.random.key(1)).assert_close()


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_micro_batches_of_a_sharded_batch_stay_where_they_are(kind):
    params, batch = placed(meshes()[kind])
    still = bh.objective(
        bh.chain(bh.embedding(11, 6), bh.dense(11)), bh.losses.softmax_cross_entropy
    )
    own = {"table": params["tokens"]["table"]}, {"w": jnp.ones((6, 11)), "b": jnp.zeros(11)}
    own = jax.device_put(own, jax.tree.leaves(params)[0].sharding)
    evaluate = bh.value_and_grad(still)
    truth = jax.jit(evaluate)(jax.device_get(own), BATCH)
    run = jax.jit(lambda params, batch: bh.accumulate(evaluate, 2)(params, batch))
    assert_close(run(own, batch), truth, 2e-5)


@pytest.mark.parametrize(("kind", "gradients"), [("explicit", "manual"), ("auto", "automatic")])
def test_training_on_a_mesh_is_training(kind, gradients):
    params, batch = placed(meshes()[kind])
    optimizer = optax.sgd(0.1, momentum=0.9)
    states = []
    for own, data in ((params, batch), (parameters(), BATCH)):
        step = bh.train_step(OBJECTIVE, optimizer, gradients=gradients)
        state = bh.train_state(own, optimizer, key=jax.random.key(1))
        for _ in range(2):
            state, metrics = step(state, data)
        states.append((state.params, metrics))
    assert_close(*states, 5e-5, floor=1e-6)


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_inside_shard_map_the_gradient_is_the_global_one(kind):
    """Replicated parameters used with local activations: their cotangent is psummed once, by us."""
    mesh = meshes()[kind]
    block = bh.skip(bh.chain(bh.layer_norm(), bh.dense(6), bh.gelu()))
    model = bh.share(
        bh.chain(tokens=bh.embedding(11, 6), blocks=bh.repeat(block, 2), logits=bh.unembedding(11)),
        {"logits/table": "tokens/table"},
    )
    objective = bh.objective(model, bh.losses.softmax_cross_entropy)
    params = spread(objective.init(jax.random.key(0), BATCH))
    truth = jax.jit(bh.value_and_grad(objective))(params, BATCH)
    evaluate = bh.value_and_grad(objective).evaluate

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def local(params, batch):
        weight = jax.lax.psum(3 * jnp.sum(batch["weights"]), "data")
        terms, collected = evaluate(params, batch, scale=1 / weight)
        return jax.lax.psum(terms.total, "data") / weight, collected["gradients"]

    with jax.set_mesh(mesh):
        params, batch = (
            jax.device_put(tree, NamedSharding(mesh, spec))
            for tree, spec in ((params, P()), (BATCH, P("data")))
        )
        assert_close(jax.jit(local)(params, batch), truth, 2e-5, floor=1e-6)
