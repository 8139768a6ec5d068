"""Parameters used more than once: their gradients, their per-example norms, what they cost."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    initial,
    labels,
    normal,
    spread,
    temporary_bytes,
)

TIED_TABLE = {"logits/table": "tokens/table"}


def language_model(depth=3, features=6, vocabulary=11, tied=True):
    block = bh.skip(bh.chain(bh.layer_norm(), bh.dense(features), bh.tanh()))
    model = bh.chain(
        tokens=bh.embedding(vocabulary, features),
        blocks=bh.repeat(block, depth),
        logits=bh.unembedding(vocabulary),
    )
    return bh.share(model, TIED_TABLE) if tied else model


def language_batch(vocabulary=11, shape=(4, 5)):
    return {"inputs": labels(0, vocabulary, *shape), "targets": labels(1, vocabulary, *shape)}


def made(objective, batch):
    return spread(objective.init(jax.random.key(0), batch))


def test_a_tied_table_is_one_parameter_with_the_gradient_and_norms_of_all_its_uses(x64):
    batch = language_batch()
    objective = bh.objective(language_model(), bh.losses.softmax_cross_entropy)
    params = made(objective, batch)
    assert (params["tokens"]["table"].shape, params["logits"]) == ((11, 6), {})
    depth = {"tokens": 0, "blocks": 1, "logits": 0}
    tied = assert_gradient_and_norms(objective, params, batch, depth)

    untied = bh.objective(language_model(tied=False), bh.losses.softmax_cross_entropy)
    collect = bh.value_and_collect(untied, gradients=bh.gradients, norms=bh.square_norms)
    _, apart = jax.jit(collect)({**params, "logits": params["tokens"]}, batch)
    sums = {name: apart[name]["tokens"]["table"] + apart[name]["logits"]["table"] for name in apart}
    assert_close(tied["gradients"]["tokens"]["table"], sums["gradients"])
    # The norm of the sum is not the sum of the norms.
    right = tied["norms"]["tokens"]["table"]
    assert jnp.max(jnp.abs(sums["norms"] / right - 1)) > 0.01


@pytest.mark.parametrize(("uses", "shape"), [(2, (5, 4)), (3, (5, 3, 4))])
def test_a_block_used_several_times_has_the_gradient_and_norms_of_one(x64, uses, shape):
    block = bh.chain(bh.dense(4), bh.tanh(), bh.layer_norm())
    ties = {str(place): "0" for place in range(1, uses)}
    model = bh.share(bh.chain(*[block] * uses), ties)
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, *shape), "targets": normal(1, *shape)}
    params = made(objective, batch)
    assert params[1:] == ((),) * (uses - 1)
    assert_gradient_and_norms(objective, params, batch)
    assert_backward_is_the_gradient(model, params, batch["inputs"])


def test_a_tie_may_reach_into_a_tuple_and_be_chained(x64):
    model = bh.chain(
        first=bh.chain(bh.dense(4), bh.tanh()),
        second=bh.chain(bh.dense(4), bh.tanh()),
        third=bh.dense(4),
    )
    shared = bh.share(model, {"second/0/w": "first/0/w", "third": "second/0"})
    x = normal(0, 3, 4)
    params = initial(shared, x)
    assert set(params) == {"first", "second"}
    assert set(params["second"][0]) == {"b"}
    assert_backward_is_the_gradient(shared, params, x)
    backwards = bh.share(model, {"third": "second/0", "second/0/w": "first/0/w"})
    with pytest.raises(ValueError, match="the parameters with ties must have the shape"):
        jax.eval_shape(backwards.init, jax.random.key(0), x)


@pytest.mark.parametrize("tied", ["", "/linear/w"], ids=["whole", "a weight"])
def test_stacks_can_be_tied(x64, tied):
    block = bh.chain(linear=bh.dense(4), act=bh.tanh(), norm=bh.layer_norm())
    model = bh.chain(down=bh.repeat(block, 3), up=bh.repeat(block, 3))
    batch = {"inputs": normal(0, 5, 4), "targets": normal(1, 5, 4)}
    shared = bh.share(model, {f"up{tied}": f"down{tied}"})
    objective = bh.objective(shared, bh.losses.mean_squared_error)
    params = made(objective, batch)
    assert params["down"]["linear"]["w"].shape == (3, 4, 4)
    assert_gradient_and_norms(objective, params, batch, depth=1)


def test_sharing_inside_a_repeated_block_ties_within_each_step(x64):
    block = bh.share(bh.chain(a=bh.dense(4), act=bh.tanh(), b=bh.dense(4)), {"b/w": "a/w"})
    model = bh.repeat(bh.checkpoint(block), 3)
    batch = {"inputs": normal(0, 5, 2, 4), "targets": normal(1, 5, 2, 4)}
    objective = bh.objective(model, bh.losses.mean_squared_error)
    params = made(objective, batch)
    assert params["a"]["w"].shape == (3, 4, 4)
    assert_gradient_and_norms(objective, params, batch, depth=1)


def test_a_frozen_use_adds_nothing(x64):
    model = bh.share(bh.chain(a=bh.freeze(bh.dense(4)), act=bh.tanh(), b=bh.dense(4)), {"b": "a"})
    x = normal(0, 3, 4)
    params = initial(model, x)
    assert_backward_is_the_gradient(model, params, x)
    both = bh.share(
        bh.chain(a=bh.freeze(bh.dense(4)), act=bh.tanh(), b=bh.freeze(bh.dense(4))), {"b": "a"}
    )
    assert_backward_is_the_gradient(both, params, x)


def test_running_statistics_shared_by_two_uses_see_both(x64):
    block = bh.chain(norm=bh.batch_norm(), act=bh.tanh())
    model = bh.share(bh.chain(a=block, b=block), {"b": "a"})
    x = normal(0, 6, 4)
    params = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def run(params, x):
        y, residuals = model.forward(params, x, training=True)
        return model.backward(params, residuals, y, bh.statistics, training=True)[0]

    seen = run(params, x)
    between = bh.tanh()((), bh.ops.batch_norm.forward(x, jnp.ones(4), jnp.zeros(4))[0])
    both = jnp.concatenate([x, between])
    running = bh.merge_statistics(params, seen)["a"]["norm"]["running"]
    assert_close(running.mean, 0.01 * jnp.mean(both, 0))
    assert_close(running.var, 0.99 + 0.01 * jnp.var(both, 0))


def test_sharing_costs_no_memory_but_that_of_the_sum():
    """Contributions that no collector reads are dead code to the compiler."""
    batch = language_batch(vocabulary=64, shape=(16, 32))
    measured = {}
    for tied in (True, False):
        model = language_model(depth=12, features=64, vocabulary=64, tied=tied)
        objective = bh.objective(model, bh.losses.softmax_cross_entropy)
        params = jax.eval_shape(lambda key, o=objective: o.init(key, batch), jax.random.key(0))
        measured[tied] = temporary_bytes(bh.value_and_grad(objective), params, batch)
    assert measured[True] <= 1.1 * measured[False], measured
    keep = bh.Collector(lambda visit: visit.contributions)
    tied = bh.objective(
        language_model(depth=12, features=64, vocabulary=64), bh.losses.softmax_cross_entropy
    )
    params = jax.eval_shape(lambda key: tied.init(key, batch), jax.random.key(0))
    used = jax.jit(bh.value_and_collect(tied, kept=keep)).lower(params, batch).compile()
    assert used.memory_analysis().output_size_in_bytes > 0.5 * measured[True]


def test_ties_that_do_not_fit_are_refused(nothing_compiles):
    model = bh.chain(a=bh.dense(4), b=bh.dense(3))
    x, key = jax.ShapeDtypeStruct((2, 5), "float32"), jax.random.key(0)
    with (
        nothing_compiles(),
        pytest.raises(
            ValueError,
            match=r"'b/w' must have the shape.*'a/w': float32\[5, 4\]; got float32\[4, 3\]",
        ),
    ):
        jax.eval_shape(bh.share(model, {"b/w": "a/w"}).init, key, x)
    for ties in ({"c/w": "a/w"}, {"b/w": "c/w"}):
        with nothing_compiles(), pytest.raises(ValueError, match=r"no parameter at 'c.*'a', 'b'"):
            jax.eval_shape(bh.share(model, ties).init, key, x)
