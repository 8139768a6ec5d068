"""Layer and batch normalization: gradients, running statistics, and who may change them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_backward_is_the_gradient, assert_close, initial, normal, spread


def block():
    return bh.chain(
        linear=bh.dense(3), norm=bh.batch_norm(decay=0.9), act=bh.tanh(), out=bh.dense(3)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer", [block(), bh.repeat(block(), 2), bh.repeat(bh.checkpoint(block()), 2)], ids=repr
)
def test_batch_norm_has_the_gradient_of_autodiff(x64, layer, training):
    x = normal(0, 5, 2, 3)
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x, training=training)


def statistics_of(layer, params, x):
    @jax.jit
    def run(params, x):
        y, residuals = layer.forward(params, x, training=True)
        return layer.backward(params, residuals, y, bh.statistics, training=True)[0]

    return run(params, x)


def test_statistics_are_those_of_the_batch(x64):
    layer = bh.batch_norm(decay=0.9)
    x = 3 + 2 * normal(0, 7, 2, 4)
    params = initial(layer, x)
    seen = statistics_of(layer, params, x)
    old, new = params["running"], bh.merge_statistics(params, seen)["running"]
    assert_close(new.mean, 0.9 * old.mean + 0.1 * x.mean((0, 1)))
    assert_close(new.var, 0.9 * old.var + 0.1 * x.var((0, 1)), 1e-10)
    assert (seen["scale"], seen["offset"]) == (None, None)
    assert bh.merge_statistics(params, seen)["scale"] is params["scale"]


@pytest.mark.parametrize("around", [lambda inner: inner, bh.checkpoint], ids=["", "checkpoint"])
def test_statistics_of_repeated_blocks_are_those_of_each_step(x64, around):
    layer = bh.repeat(around(block()), 2)
    x = normal(0, 6, 3)
    params = initial(layer, x)
    merged = bh.merge_statistics(params, statistics_of(layer, params, x))["norm"]["running"]
    for step in range(2):
        own = jax.tree.map(lambda leaf, step=step: leaf[step], params)
        inside = bh.dense(3)(own["linear"], x)
        old = own["norm"]["running"]
        assert_close(merged.mean[step], 0.9 * old.mean + 0.1 * inside.mean(0), 1e-10)
        assert_close(merged.var[step], 0.9 * old.var + 0.1 * inside.var(0), 1e-10)
        x = block()(own, x, training=True)


def test_moments_of_ragged_parts_add_up_exactly(x64):
    layer = bh.batch_norm()
    x = 100 + normal(0, 11, 4)
    params = initial(layer, x)
    parts = [statistics_of(layer, params, part) for part in (x[:2], x[2:5], x[5:])]
    seen = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    whole = statistics_of(layer, params, x)
    assert seen["running"].count == 11
    assert_close(seen, whole, 1e-9)
    merged = bh.merge_statistics(params, seen)["running"]
    assert_close(merged.var, 0.99 * params["running"].var + 0.01 * x.var(0), 1e-9)


def test_a_variance_far_from_zero_survives_float32():
    """Sums of squares around the running mean do not cancel, as those around zero would."""
    layer = bh.batch_norm(decay=0.0)
    x = 1000 + normal(0, 256, 1)
    params = layer.init(jax.random.key(0), x)
    for _ in range(2):
        params = bh.merge_statistics(params, statistics_of(layer, params, x))
    assert float(params["running"].var[0]) == pytest.approx(float(jnp.var(x)), rel=1e-3)


def test_statistics_of_nothing_change_nothing():
    running = bh.Running(jnp.ones(2), jnp.full(2, 3.0), 0.9)
    nothing = bh.Moments(jnp.zeros(()), jnp.zeros(2), jnp.zeros(2))
    assert_close(running.merge(nothing), running, 0)


def test_evaluation_uses_the_running_statistics(x64):
    layer = bh.batch_norm(eps=0.0)
    x = normal(0, 5, 2)
    params = initial(layer, x)
    running = params["running"]
    expected = (x - running.mean[None]) / jnp.sqrt(running.var)[None] * params["scale"][None]
    assert_close(layer(params, x, training=False), expected + params["offset"][None])
    one = layer(params, x[:1], training=False)
    assert_close(one, layer(params, x, training=False)[:1])
    assert jnp.max(jnp.abs(layer(params, x, training=True) - expected)) > 0.1


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_moves_running_statistics_by_the_data_alone(x64, gradients, accumulate):
    """AdamW would decay a variance; both kinds of gradients merge the same statistics."""
    model = bh.chain(norm=bh.batch_norm(decay=0.5), out=bh.dense(2))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    # The two micro-batches hold the same examples, so their own statistics are the batch's.
    batch = {"inputs": jnp.repeat(normal(0, 4, 3), 2, 0), "targets": normal(1, 8, 2)}
    params = spread(objective.init(jax.random.key(0), batch))
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    step = bh.train_step(objective, optimizer, accumulate=accumulate, gradients=gradients)
    state = bh.train_state(params, optimizer)
    running = params["norm"]["running"]
    for _ in range(3):
        state, _ = step(state, batch)
        mean = 0.5 * running.mean + 0.5 * batch["inputs"].mean(0)
        var = 0.5 * running.var + 0.5 * batch["inputs"].var(0)
        running = bh.Running(mean, var, 0.5)
    assert_close(state.params["norm"]["running"], running, 1e-6)
    assert_close(bh.grad(objective)(params, batch)["norm"]["running"].var, jnp.zeros(3))
    assert jnp.max(jnp.abs(state.params["norm"]["scale"] - params["norm"]["scale"])) > 0.1


def test_statistics_leave_padding_out(x64):
    layer, x = bh.batch_norm(decay=0.9), normal(0, 4, 3, 2)
    mask = jnp.arange(3)[None] < jnp.array([3, 1, 0, 2])[:, None]
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x, training=True, mask=mask)
    y, residuals = layer.forward(params, x, training=True, mask=mask)
    seen = layer.backward(params, residuals, y, bh.statistics, training=True, mask=mask)[0]
    assert seen["running"].count == 6
    old, new = params["running"], bh.merge_statistics(params, seen)["running"]
    assert_close(new.mean, 0.9 * old.mean + 0.1 * x[mask].mean(0))
    assert_close(new.var, 0.9 * old.var + 0.1 * x[mask].var(0), 1e-10)
    evaluated = layer(params, x, training=False, mask=mask)
    assert_close(evaluated, layer(params, x, training=False), 0)


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
def test_frozen_for_fine_tuning_it_trains_by_what_it_learned(x64, gradients):
    """A step sees the running statistics, leaves them be, and passes blame through them."""
    fixed = bh.chain(norm=bh.batch_norm(decay=0.5), act=bh.tanh())
    model = bh.chain(below=bh.dense(3), fixed=bh.freeze(fixed), out=bh.dense(2))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 5, 3), "targets": normal(1, 5, 2)}
    params = spread(objective.init(jax.random.key(0), batch))
    step = bh.train_step(objective, optax.sgd(0.1), gradients=gradients)
    state, metrics = step(bh.train_state(params, optax.sgd(0.1)), batch)

    def evaluated(params):
        return objective(params, batch, training=False)

    value, grads = jax.value_and_grad(evaluated)(params)
    assert_close(metrics["loss"], value)
    assert_close(state.params["fixed"], params["fixed"], 0)
    for name in ("below", "out"):
        truth = jax.tree.map(lambda p, g: p - 0.1 * g, params[name], grads[name])
        assert_close(state.params[name], truth)


def test_dropout_stays_where_parameters_are_frozen():
    layer = bh.freeze(bh.chain(bh.batch_norm(eps=0.0), bh.dropout(0.5)))
    x = jnp.ones((64, 8))
    params = layer.init(jax.random.key(0), x)
    y = layer(params, x, training=True, key=jax.random.key(1))
    assert set(jnp.unique(y).tolist()) == {0.0, 2.0}
    assert_close(layer(params, x, training=False), x)


@pytest.mark.parametrize("layer", [bh.group_norm(2), bh.instance_norm(), bh.rms_norm()], ids=repr)
def test_other_norms_have_the_gradient_of_autodiff(x64, layer):
    x = normal(0, 3, 2, 2, 4)
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x)
    assert_close(layer(params, x)[1:2], layer(params, x[1:2]))


def test_features_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"divides the 6 features .*groups=4"):
        bh.group_norm(4).init(jax.random.key(0), jax.ShapeDtypeStruct((2, 6), "float32"))


def test_layer_norm_looks_at_one_position_alone(x64):
    x = normal(0, 3, 2, 4)
    layer = bh.layer_norm(eps=1e-12)
    params = initial(layer, x)
    y = layer(params, x)
    assert_close(layer(params, x[1:2, 1:]), y[1:2, 1:])
    assert_close(layer(params, 7 + 1e3 * x), y, 1e-10)


def test_no_features_are_no_exception():
    x, layer = jnp.zeros((2, 3, 0)), bh.instance_norm()
    params = layer.init(jax.random.key(0), x)
    assert layer.backward(params, layer.forward(params, x)[1], x)[1].shape == x.shape


def test_what_cannot_be_normalized_is_refused(unchecked, nothing_compiles):
    key = jax.random.key(0)
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"decay in \[0, 1\], got 1.5"):
            bh.batch_norm(decay=1.5)
        for layer in (bh.batch_norm(), bh.layer_norm(), bh.rms_norm(), bh.instance_norm()):
            with pytest.raises(ValueError, match=rf"{layer.name} needs x of shape .*got \(3,\)"):
                jax.eval_shape(layer.init, key, jax.ShapeDtypeStruct((3,), "float32"))
            with pytest.raises(TypeError, match="floating-point input, got int32 of shape"):
                jax.eval_shape(layer.init, key, jax.ShapeDtypeStruct((2, 3), "int32"))
        with pytest.raises(ValueError, match=r"one axis of positions, got \(2, 3\)"):
            jax.eval_shape(bh.instance_norm().init, key, jax.ShapeDtypeStruct((2, 3), "float32"))
        params, x = {"scale": np.ones(3), "offset": np.zeros(3)}, np.zeros((2, 3))
        with pytest.raises(TypeError, match="training must be True or False, got 'no'"):
            jax.eval_shape(lambda: bh.batch_norm()(params, x, training="no"))
        with pytest.raises(TypeError, match="needs the side input 'training'"):
            jax.eval_shape(
                lambda key: bh.batch_norm()(bh.batch_norm().init(key, jnp.zeros((2, 3))), 0.0), key
            )
