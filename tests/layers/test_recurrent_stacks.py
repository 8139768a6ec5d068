"""Recurrent layers together: both directions, several layers, states through windows and steps."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    initial,
    normal,
    spread,
)

MAKERS = {"lstm": bh.lstm, "gru": bh.gru, "rnn": bh.rnn}
LENGTHS = jnp.array([4, 1, 3])


def test_both_directions_see_the_whole_sequence(x64):
    x = normal(0, 3, 4, 2)
    layer = bh.bidirectional(bh.lstm, 3)
    params = initial(layer, x)
    for t, of_ahead, of_back in ((0, 1, 4), (3, 4, 1)):
        for part, count in ((slice(0, 3), of_ahead), (slice(3, 6), of_back)):
            blame = jax.grad(lambda x, t=t, p=part: layer(params, x)[:, t, p].sum())(x)
            assert int((blame != 0).any((0, 2)).sum()) == count
    assert repr(layer) == "bidirectional(ahead=lstm, back=lstm)"


@pytest.mark.parametrize("name", MAKERS)
def test_both_directions_take_and_give_states(name, x64):
    layer = bh.bidirectional(MAKERS[name], 3, return_state=True)
    x = normal(0, 3, 4, 2)
    params = initial(layer, x)
    _, states = layer(params, x)
    given = jax.tree.map(lambda leaf: normal(5, *leaf.shape), states)
    assert_backward_is_the_gradient(layer, params, {"x": x, "state": given}, lengths=LENGTHS)
    alone = MAKERS[name](3, reverse=True, return_state=True)
    assert_close(
        layer(params, {"x": x, "state": given})[1][1],
        alone(params["back"], {"x": x, "state": given[1]})[1],
    )


def test_one_direction_of_both_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"leave `reverse` out, or use lstm\(4, reverse=True\)"):
        bh.bidirectional(bh.lstm, 4, reverse=True)
    both, x = bh.bidirectional(bh.lstm, 4), jnp.ones((3, 5, 2))
    with pytest.raises(ValueError, match=r"for each direction, .* got an array of shape"):
        both(both.init(jax.random.key(0), x), {"x": x, "state": jnp.ones((3, 4))})


# Several layers -----------------------------------------------------------------------------------


def test_layers_on_one_another_are_a_chain_that_hands_on_states(x64):
    x = normal(0, 3, 4, 2)
    layer = bh.stacked(bh.lstm, 3, layers=2, return_state=True)
    params = initial(layer, x)
    chained = bh.chain(bh.lstm(3), bh.lstm(3))
    y, states = layer(params, x, lengths=LENGTHS)
    assert_close(y, chained(params, x, lengths=LENGTHS))
    given = {"x": x, "state": jax.tree.map(lambda leaf: normal(5, *leaf.shape), states)}
    assert_backward_is_the_gradient(layer, params, given, lengths=LENGTHS)
    assert_backward_is_the_gradient(bh.stacked(bh.lstm, 3, 2), params, given)


def test_both_directions_can_be_stacked(x64):
    layer = bh.stacked(functools.partial(bh.bidirectional, bh.gru), 3, 2, return_state=True)
    x = normal(0, 3, 4, 2)
    params = initial(layer, x)
    y, states = layer(params, x)
    assert y.shape == (3, 4, 6) and params[1]["ahead"]["wx"].shape == (6, 9)
    assert_backward_is_the_gradient(layer, params, {"x": x, "state": states})


def test_norms_of_examples_come_with_the_gradient(x64):
    model = bh.chain(bh.stacked(bh.gru, 3, 2), bh.dense(2))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 3, 4, 2), "targets": normal(1, 3, 4, 2), "lengths": LENGTHS}
    assert_gradient_and_norms(objective, initial(model, batch["inputs"]), batch)


def test_two_windows_are_one_sequence():
    layer, x = bh.stacked(bh.rnn, 3, 2, return_state=True), normal(0, 3, 6, 2)
    params = initial(layer, x)
    whole, last = layer(params, x)
    first, state = layer(params, x[:, :2])
    second, end = layer(params, {"x": x[:, 2:], "state": state})
    assert_close((jnp.concatenate([first, second], 1), end), (whole, last), rtol=1e-6)


def test_wrong_states_are_refused(unchecked):
    with pytest.raises(ValueError, match="stacked needs at least 1 layer, got 0"):
        bh.stacked(bh.lstm, 4, 0)
    layer, x = bh.stacked(bh.rnn, 4, 2), jnp.ones((3, 5, 2))
    with pytest.raises(ValueError, match="of 2 states, one for each layer, got a tuple of 1"):
        layer.init(jax.random.key(0), {"x": x, "state": (jnp.ones((3, 4)),)})


# Truncated backpropagation through time -----------------------------------------------------------


@pytest.mark.parametrize("gradients", ["manual", "automatic"])
def test_a_step_takes_the_state_of_a_window_and_gives_that_of_the_next(x64, gradients):
    """Each step's gradient is that of its window alone, from a state that is a plain array."""
    model = bh.chain(
        bh.on("x", bh.dense(3)),
        bh.stacked(bh.lstm, 3, 2, return_state=True),
        bh.on(0, bh.dense(2)),
    )
    objective = bh.objective(
        model,
        bh.losses.with_state(bh.losses.mean_squared_error),
        metrics={"state": bh.metrics.state},
    )
    x, targets = normal(0, 4, 9, 2), normal(1, 4, 9, 2)
    state = ((jnp.zeros((4, 3)),) * 2,) * 2
    batch = {"inputs": {"x": x[:, :3], "state": state}, "targets": targets[:, :3]}
    params = spread(objective.init(jax.random.key(0), batch))
    training = bh.train_state(params, optax.sgd(0.1))
    step = bh.train_step(objective, optax.sgd(0.1), gradients=gradients)

    @jax.jit
    def by_hand(params, x, targets, state):
        def loss(params):
            y, last = model(params, {"x": x, "state": state})
            return jnp.mean((y - targets) ** 2), last

        (value, last), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, last, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    for begin in range(0, 9, 3):
        part = x[:, begin : begin + 3], targets[:, begin : begin + 3]
        value, last, params = by_hand(params, *part, state)
        batch = {"inputs": {"x": part[0], "state": state}, "targets": part[1]}
        training, metrics = step(training, batch)
        assert_close((metrics["loss"], metrics["state"], training.params), (value, last, params))
        state = metrics["state"]


def test_a_state_beside_predictions_needs_a_loss_that_knows_it(unchecked, nothing_compiles):
    model = bh.lstm(2, return_state=True)
    batch = {"inputs": jnp.ones((2, 3, 2)), "targets": jnp.ones((2, 3, 2))}
    plain = bh.objective(model, bh.losses.mean_squared_error)
    with (
        nothing_compiles(),
        pytest.raises(TypeError, match="one array of predictions, got a tuple"),
    ):
        plain.init(jax.random.key(0), batch)
