"""Recurrent layers: states in and out, truncated windows, both directions, per-example norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import (
    assert_backward_is_the_gradient,
    assert_close,
    assert_gradient_and_norms,
    initial,
    normal,
)

MAKERS = {"lstm": bh.lstm, "gru": bh.gru, "rnn": bh.rnn}
LENGTHS = jnp.array([4, 1, 3])


def from_state(x, state):
    return {"x": x, "state": state}


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_begin_where_errors_keep_their_size(name):
    params = MAKERS[name](8).init(jax.random.key(0), jnp.ones((2, 5, 3)))
    for gate in jnp.split(params["wh"], params["wh"].shape[1] // 8, axis=1):
        assert_close(gate @ gate.T, jnp.eye(8), floor=1e-5)
    ones = np.flatnonzero(params["b"])
    assert ones.tolist() == (list(range(8, 16)) if name == "lstm" else [])


@pytest.mark.parametrize("name", MAKERS)
def test_no_blame_crosses_the_cut_of_a_truncated_window(name, x64):
    """And all of it without the cut: then two windows are one sequence."""
    layer, x = MAKERS[name](4, return_state=True), normal(0, 3, 6, 2)
    params = initial(layer, x)

    def loss(params, x, cut):
        _, state = layer(params, x[:, :3])
        y, _ = layer(params, from_state(x[:, 3:], jax.lax.stop_gradient(state) if cut else state))
        return jnp.sum(y * normal(1, *y.shape))

    def whole(params, x):
        y, _ = layer(params, x)
        return jnp.sum(y[:, 3:] * normal(1, 3, 3, 4))

    assert_close(*(jax.grad(f, (0, 1))(params, x) for f in (lambda *a: loss(*a, False), whole)))
    dparams, dx = jax.grad(loss, (0, 1))(params, x, True)
    assert not dx[:, :3].any() and dx[:, 3:].any()
    _, state = layer(params, x[:, :3])
    second = jax.grad(
        lambda p: jnp.sum(layer(p, from_state(x[:, 3:], state))[0] * normal(1, 3, 3, 4))
    )
    assert_close(dparams, second(params))


def test_truncated_backpropagation_trains_across_windows(x64):
    """A state from step to step, handed on as an array: by hand as by `jax.grad`."""
    layer = bh.lstm(4, return_state=True)
    x, targets = normal(0, 3, 8, 2), normal(1, 3, 8, 4)
    params, state = initial(layer, x), (jnp.zeros((3, 4)), jnp.zeros((3, 4)))
    for window in range(0, 8, 4):
        part = x[:, window : window + 4], targets[:, window : window + 4]

        def loss(params, state=state, part=part):
            y, last = layer(params, from_state(part[0], state))
            return jnp.mean((y - part[1]) ** 2), last

        (_, last), automatic = jax.value_and_grad(loss, has_aux=True)(params)
        (y, ours), residuals = layer.forward(params, from_state(part[0], state))
        dy = 2 * (y - part[1]) / y.size, jax.tree.map(jnp.zeros_like, ours)
        dparams, dx = layer.backward(params, residuals, dy)
        assert_close((dparams, ours), (automatic, last))
        assert dx["x"].shape == part[0].shape and dx["state"][0].any()
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, dparams)
        state = ours


@pytest.mark.parametrize("name", MAKERS)
def test_norms_of_examples_come_with_the_gradient(name, x64):
    """Time is summed inside an example; lengths differ."""
    model = bh.chain(one=MAKERS[name](5), two=MAKERS[name](4, reverse=True), out=bh.dense(2))
    objective = bh.objective(model, bh.losses.mean_squared_error)
    batch = {"inputs": normal(0, 3, 4, 2), "targets": normal(1, 3, 4, 2), "lengths": LENGTHS}
    params = initial(model, batch["inputs"])
    assert_gradient_and_norms(objective, params, batch)


def test_several_layers_are_a_chain():
    model = bh.chain(bh.bidirectional(bh.gru, 4), bh.lstm(5), bh.rnn(3, activation="relu"))
    params = model.init(jax.random.key(0), jnp.ones((2, 5, 3)))
    assert model(params, jnp.ones((2, 5, 3)), lengths=jnp.array([5, 2])).shape == (2, 5, 3)


@pytest.mark.parametrize("name", MAKERS)
def test_the_state_of_one_layer_is_not_taken_for_that_of_the_next(name, unchecked):
    make, x = MAKERS[name], jnp.ones((3, 5, 2))
    for above in (make(4), bh.bidirectional(make, 4), bh.stacked(make, 4, 2)):
        model = bh.chain(make(4, return_state=True), above)
        with pytest.raises(TypeError, match=r"a dict of 'x' and 'state', got a tuple of 2; .*pick"):
            model.init(jax.random.key(0), x)


@pytest.mark.parametrize("name", MAKERS)
def test_an_output_that_nobody_reads_has_no_blame(name, x64):
    """Of y and the state, one alone is read."""
    x = normal(0, 3, 4, 2)
    for part in (0, 1):
        model = bh.chain(MAKERS[name](4, return_state=True), bh.pick(part))
        assert_backward_is_the_gradient(model, initial(model, x), x)


def test_an_encoder_hands_its_state_to_a_decoder(x64):
    """Sequence to sequence: the state is a part like any other, and blame goes through it."""
    model = bh.chain(
        bh.on("state", bh.chain(bh.lstm(3, return_state=True), bh.pick(1))),
        bh.lstm(3),
    )
    x = {"x": normal(0, 2, 4, 2), "state": normal(1, 2, 5, 4)}
    params = initial(model, x)
    assert_backward_is_the_gradient(model, params, x)


@pytest.mark.parametrize("name", MAKERS)
def test_what_does_not_fit_is_refused(name, unchecked):
    make = MAKERS[name]
    with pytest.raises(ValueError, match=f"{name} needs at least 1 feature, got 0"):
        make(0)
    key, layer = jax.random.key(0), make(4)
    with pytest.raises(ValueError, match=rf"{name} needs x of shape \(B, T, D\), got \(5, 2\)"):
        layer.init(key, jnp.ones((5, 2)))
    params = layer.init(key, jnp.ones((3, 5, 2)))
    with pytest.raises(ValueError, match="a dict of 'x' and 'state', got a dict of 'h', 'x'"):
        layer(params, {"x": jnp.ones((3, 5, 2)), "h": 1.0})
    with pytest.raises(ValueError, match="lengths from 0 to 5, the steps of x; got 7 at"):
        layer(params, jnp.ones((3, 5, 2)), lengths=np.array([1, 7, 2]))
    with pytest.raises(TypeError, match="no side input 'length'; did you mean 'lengths'"):
        layer(params, jnp.ones((3, 5, 2)), length=LENGTHS)
    if name == "rnn":
        with pytest.raises(ValueError, match=r"rnn needs activation .* got 'gelu'"):
            make(4, activation="gelu")
