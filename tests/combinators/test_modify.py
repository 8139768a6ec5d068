"""One layer, changed: recomputed, frozen, renamed."""

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh
from tests.support import assert_backward_is_the_gradient, assert_close, initial, normal, spread


def block():
    return bh.chain(norm=bh.layer_norm(), up=bh.dense(8), act=bh.gelu(), down=bh.dense(4))


@pytest.mark.parametrize(
    "layer",
    [
        bh.checkpoint(block()),
        bh.skip(bh.checkpoint(block())),
        bh.checkpoint(bh.checkpoint(bh.chain(block(), bh.dropout(0.3)))),
        bh.checkpoint(bh.chain(bh.batch_norm(), bh.dense(3))),
    ],
    ids=repr,
)
def test_a_checkpointed_layer_has_the_gradient_of_the_layer(x64, layer):
    x = normal(0, 3, 4)
    given = {"training": True, "key": jax.random.key(1)}
    side = {name: value for name, value in given.items() if name in layer.uses}
    assert_backward_is_the_gradient(layer, initial(layer, x), x, **side)


def test_a_checkpoint_saves_its_input_alone():
    layer = bh.checkpoint(block())
    x = jnp.ones((3, 4))
    params = layer.init(jax.random.key(0), x)
    assert layer.forward(params, x)[1] is x


def test_a_checkpoint_passes_on_what_the_layer_does_not_change():
    """Then a context beside x stays one array, however many layers read it."""
    passing = bh.layer(
        "passing",
        lambda key, x: (),
        lambda params, x: ({**x, "h": jnp.sin(x["h"])}, x["h"]),
        lambda params, h, dy: ((), {**dy, "h": dy["h"] * jnp.cos(h)}),
    )
    x = {"h": jnp.ones(2), "context": jnp.ones(3)}
    y, _ = bh.checkpoint(passing).forward((), x)
    assert y["context"] is x["context"]
    assert_close(y["h"], jnp.sin(x["h"]))
    grads = jax.grad(lambda x: sum(jnp.sum(v) for v in bh.checkpoint(passing)((), x).values()))(x)
    assert_close(grads, {"h": jnp.cos(x["h"]), "context": jnp.ones(3)})


# freeze -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [bh.freeze(block()), bh.chain(bh.dense(4), bh.freeze(block()), bh.dense(2))], ids=repr
)
def test_what_is_frozen_has_a_gradient_of_zero_and_passes_blame_on(x64, layer):
    x = normal(0, 3, 4)
    params = initial(layer, x)
    assert_backward_is_the_gradient(layer, params, x)
    y, residuals = layer.forward(params, x)
    grads, dx = layer.backward(params, residuals, y)
    frozen = grads[1] if isinstance(grads, tuple) else grads
    assert not any(leaf.any() for leaf in jax.tree.leaves(frozen))
    assert dx.any()


def test_a_frozen_weight_costs_no_gradient():
    """Backward of a dense layer is two products, and one when its weight is frozen."""
    x = jnp.ones((256, 128))

    def flops(layer):
        params = {"w": jnp.ones((128, 128)), "b": jnp.ones(128)}
        run = jax.jit(lambda params, x: layer.backward(params, x, x))
        return run.lower(params, x).compile().cost_analysis()["flops"]

    assert flops(bh.freeze(bh.dense(128))) < 0.55 * flops(bh.dense(128))


def test_running_statistics_stand_still_when_frozen():
    layer = bh.freeze(bh.batch_norm())
    x = normal(0, 5, 3)
    params = initial(layer, x)
    y, residuals = layer.forward(params, x, training=True)
    seen, _ = layer.backward(params, residuals, y, bh.statistics, training=True)
    assert_close(bh.merge_statistics(params, seen), params, 0)


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
def test_training_leaves_frozen_layers_without_a_gradient(x64, gradients):
    model = bh.chain(fixed=bh.freeze(bh.dense(4)), free=bh.dense(2))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 5, 3), "targets": normal(1, 5, 2)}
    params = spread(objective.init(jax.random.key(0), batch))
    state = bh.train_state(params, optax.adam(0.1))
    state, _ = bh.train_step(objective, optax.adam(0.1), gradients=gradients)(state, batch)
    assert_close(state.params["fixed"], params["fixed"], 0)
    assert jnp.max(jnp.abs(state.params["free"]["w"] - params["free"]["w"])) > 0.05


# rename -------------------------------------------------------------------------------------------


def masked():
    def apply(x, mask):
        return jnp.where(mask[:, None], x, 0)

    return bh.layer(
        "masked",
        lambda key, x: (),
        lambda params, x, *, mask: (apply(x, mask), ()),
        lambda params, residuals, dy, *, mask: ((), apply(dy, mask)),
    )


def test_a_renamed_side_input_is_known_by_its_new_name(x64):
    model = bh.chain(
        bh.rename(masked(), mask="source_mask"),
        bh.dense(3),
        bh.rename(masked(), mask="target_mask"),
    )
    assert model.uses == {"source_mask", "target_mask"}
    x = normal(0, 4, 2)
    side = {
        "source_mask": jnp.asarray([True, True, False, True]),
        "target_mask": jnp.asarray([True, False, True, True]),
    }
    params = initial(model, x, **side)
    assert_backward_is_the_gradient(model, params, x, **side)
    y = model(params, x, **side)
    assert not y[1].any()
    assert_close(y[2], params[1]["b"])


def test_a_rename_of_what_is_not_used_is_refused(nothing_compiles):
    x = jnp.zeros(2)
    with nothing_compiles():
        with pytest.raises(ValueError, match=r"masked has no side input 'maks' .*; did you mean"):
            bh.rename(masked(), maks="source_mask")
        with pytest.raises(ValueError, match="dropout has no side input 'key' to rename"):
            bh.rename(bh.dropout(0.5), key="noise")
        with pytest.raises(TypeError, match="no side input 'mask'; it uses 'source_mask'"):
            bh.rename(masked(), mask="source_mask")((), x, mask=x)
