"""What rides along on the way back: norms, statistics, anything, with no change to a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.collectors import square_norms
from tests.support import (
    assert_close,
    assert_gradient_and_norms,
    labels,
    normal,
    spread,
    temporary_bytes,
)


def model():
    block = bh.skip(
        bh.chain(norm=bh.batch_norm(), wide=bh.dense(8), act=bh.gelu(), out=bh.dense(6))
    )
    return bh.share(
        bh.chain(
            tokens=bh.embedding(11, 6),
            blocks=bh.repeat(bh.checkpoint(block), 2),
            drop=bh.dropout(0.2),
            logits=bh.unembedding(11),
        ),
        {"logits/table": "tokens/table"},
    )


BATCH = {"inputs": labels(0, 11, 4, 5), "targets": labels(1, 11, 4, 5)}


def test_collectors_together_give_what_each_gives_alone(x64):
    objective = bh.objective(model(), bh.losses.softmax_cross_entropy)
    params = spread(objective.init(jax.random.key(0), BATCH))
    collectors = {
        "gradients": bh.gradients,
        "norms": bh.square_norms,
        "seen": bh.statistics,
    }

    @jax.jit
    def run(params):
        given = {"key": jax.random.key(3)}
        together = bh.value_and_collect(objective, **collectors)(params, BATCH, **given)
        alone = {
            name: bh.value_and_collect(objective, **{name: c})(params, BATCH, **given)[1][name]
            for name, c in collectors.items()
        }
        return together[1], alone

    assert_close(*run(params))


def test_a_collector_sees_each_owner_once_from_the_last_to_the_first():
    layer = bh.chain(
        first=bh.dense(3),
        act=bh.relu(),
        middle=bh.add(left=bh.skip(bh.layer_norm()), right=bh.chain(bh.tanh(), bh.dense(3))),
        end=bh.checkpoint(bh.dense(2, bias=False)),
    )
    x = jnp.ones((2, 4))
    params = layer.init(jax.random.key(0), x)
    y, residuals = layer.forward(params, x)
    seen = []

    def collect(visit):
        seen.append(sorted(visit.params))
        return {name: leaf.shape for name, leaf in visit.params.items()}, visit.dx

    collected, _ = layer.backward(params, residuals, y, collect)
    assert seen == [["w"], ["b", "w"], ["offset", "scale"], ["b", "w"]]
    assert collected["first"] == {"w": (4, 3), "b": (3,)}
    assert (list(collected), collected["act"]) == (list(layer.parts), ())


def test_what_is_not_asked_for_is_not_computed():
    called = []

    def rule(params, x, dy):
        called.append(1)
        return {"w": bh.Outer(x, dy)}, dy

    layer = bh.layer("mine", lambda key, x: {}, lambda params, x: (x @ params["w"], x), rule)
    x, params = jnp.ones((2, 3)), {"w": jnp.ones((3, 3))}
    layer.backward(params, x, x, lambda visit: (visit.params, None))
    assert not called
    layer.backward(params, x, x, lambda v: ((v.contributions, v.dparams, v.dx, v.dparams), v.dx))
    assert len(called) == 1


ONCE = bh.chain(bh.dense(3), bh.layer_norm(), bh.dense(2, bias=False))
TWICE = bh.repeat(bh.repeat(bh.chain(bh.dense(4), bh.tanh()), 2), 2)


@pytest.mark.parametrize(
    ("layer", "shape"), [(ONCE, (5, 4)), (ONCE, (5, 2, 3, 4)), (TWICE, (5, 2, 4))], ids=repr
)
def test_norms_are_those_of_one_gradient_per_example(x64, layer, shape):
    features = 4 if layer is TWICE else 2
    objective = bh.objective(layer, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, *shape), "targets": normal(1, *shape[:-1], features)}
    params = spread(objective.init(jax.random.key(0), batch))
    assert_gradient_and_norms(objective, params, batch, depth=2 if layer is TWICE else 0)


def test_norms_scale_with_the_weights_of_the_examples(x64):
    objective = bh.objective(bh.dense(2), bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 5, 4), "targets": normal(1, 5, 2)}
    params = spread(objective.init(jax.random.key(0), batch))
    collect = jax.jit(bh.value_and_collect(objective, norms=bh.square_norms))
    weights = jnp.asarray([1.0, 0, 2, 3, 1])
    _, even = collect(params, batch | {"weights": jnp.ones(5)})
    _, uneven = collect(params, batch | {"weights": weights})
    assert_close(
        bh.per_example_norms(uneven["norms"]),
        bh.per_example_norms(even["norms"]) * weights * 5 / weights.sum(),
    )


def summed(contribution):
    """A dense layer without bias whose rule gives a plain array, or what `contribution` says."""

    def rule(params, x, dy):
        return {"w": contribution(x, dy)}, dy @ params["w"].T

    return bh.layer(
        "summed",
        lambda key, x: {"w": jnp.ones((x.shape[-1], 3)) / 2},
        lambda params, x: (jnp.tanh(x) @ params["w"], jnp.tanh(x)),
        rule,
    )


def test_a_rule_that_sums_is_run_one_example_at_a_time_and_says_so(x64):
    batch = {"inputs": normal(0, 5, 4), "targets": normal(1, 5, 3)}
    results = []
    for contribution in (bh.Outer, lambda x, dy: x.T @ dy):
        objective = bh.objective(summed(contribution), bh.losses.mean_squared_error)
        params = {"w": normal(2, 4, 3)}
        collect = bh.value_and_collect(objective, norms=bh.square_norms)
        if results:
            with pytest.warns(UserWarning, match="one example at a time; return Outer, Total,"):
                results.append(collect(params, batch)[1])
        else:
            results.append(collect(params, batch)[1])
    assert_close(results[1], results[0])


def test_norms_that_cannot_be_had_are_refused(nothing_compiles):
    def rule(params, saved, dy):
        return {"s": jnp.sum(dy * saved[0])}, dy * params["s"]

    layer = bh.layer(
        "scale",
        lambda key, x: {"s": jnp.ones(())},
        lambda params, x: (x * params["s"], (x, jnp.max(x))),
        rule,
    )
    x, params = jax.ShapeDtypeStruct((2, 3), "float32"), {"s": jax.ShapeDtypeStruct((), "float32")}

    def run(params, x):
        y, residuals = layer.forward(params, x)
        return layer.backward(params, residuals, y, square_norms)[0]

    with nothing_compiles(), pytest.raises(ValueError, match=r"norms need a rule .* batch of 2"):
        jax.eval_shape(run, params, x)


def test_norms_cost_no_gradient_per_example():
    """vmap(grad) would hold a gradient of each of 64 examples."""
    layer = bh.chain(bh.dense(128), bh.tanh(), bh.dense(128), bh.tanh(), bh.dense(8))
    objective = bh.objective(layer, bh.losses.mean_squared_error)
    batch = {"inputs": np.zeros((64, 16), np.float32), "targets": np.zeros((64, 8), np.float32)}
    params = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    both = bh.value_and_collect(objective, gradients=bh.gradients, norms=bh.square_norms)
    plain = temporary_bytes(bh.value_and_grad(objective), params, batch)
    assert temporary_bytes(both, params, batch) < 1.1 * plain
    assert 64 * sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) > 20 * plain


def test_frozen_parameters_have_norms_of_zero():
    layer = bh.chain(bh.freeze(bh.dense(3)), bh.dense(2))
    x = jnp.ones((4, 3))
    params = layer.init(jax.random.key(0), x)
    y, residuals = layer.forward(params, x)
    norms, _ = layer.backward(params, residuals, y, bh.square_norms)
    assert jax.tree.map(jnp.shape, norms) == ({"w": (4,), "b": (4,)}, {"w": (4,), "b": (4,)})
    assert not any(leaf.any() for leaf in jax.tree.leaves(norms[0]))
    assert all(leaf.all() for leaf in jax.tree.leaves(norms[1]))


def test_negative_ids_are_the_rows_that_they_count_to():
    layer = bh.embedding(5, 3)
    params = layer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 2), "int32"))

    def norms(ids):
        y, residuals = layer.forward(params, jnp.array(ids))
        return layer.backward(params, residuals, jnp.ones_like(y), bh.square_norms)[0]["table"]

    assert float(norms([[-1, 4]])[0]) == float(norms([[4, 4]])[0]) == 12
    assert float(norms([[-1, 3]])[0]) == 6


def test_a_branch_without_blame_has_norms_of_zero():
    def only_first(params, residuals, dy):
        return (), (dy, None)

    first = bh.layer("first", lambda key, x: (), lambda params, x: (x[0], ()), only_first)
    model = bh.chain(bh.parallel(bh.dense(3), bh.dense(3)), first)
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    y, residuals = model.forward(params, x)
    norms = model.backward(params, residuals, jnp.ones_like(y), bh.square_norms)[0][0]
    assert (norms[0]["w"] > 0).all() and not norms[1]["w"].any()
