"""Recurrent layers: Elman, GRU and LSTM.

All take x (B, T, D), or a dict of `x` and `state` to go on from a state. With `return_state` they
give (y, state), which no recurrent layer takes for its input: go on with y alone by `pick(0)`, or
apply what follows to it with `on(0, ...)`.

Truncated backpropagation through time is state out, state in. A long sequence is read in windows;
each goes on from where the last one ended, and its blame stops at the cut, because the state comes
back from a training step as a plain array, a metric beside the loss:

    model = chain(on("x", embedding(V, D)), stacked(lstm, H, 2, return_state=True), on(0, dense(V)))
    loss = objective(
        model, losses.with_state(losses.softmax_cross_entropy), metrics={"state": metrics.state}
    )
    step = train_step(loss, optimizer)
    for ids, targets in windows:
        batch = {"inputs": {"x": ids, "state": state}, "targets": targets}
        training, metrics = step(training, batch)
        state = metrics["state"]

The first state is zeros: `jax.tree.map(jnp.zeros_like, model(params, ...)[1])`, or what a layer
that is given x alone begins with. Within one program the cut is `jax.lax.stop_gradient(state)`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import lecun_normal, orthogonal

from backhand import ops
from backhand.arrays import accumulation_dtype, whole_number
from backhand.contributions import Outer, Total
from backhand.ops.elman import elman_deltas
from backhand.ops.gru import gru_deltas
from backhand.ops.linear import linear_dx
from backhand.ops.lstm import lstm_deltas
from backhand.ops.recurrent import check_sequence, start
from backhand.protocol import Layer, Op, layer, listed
from backhand.visit import Params, PyTree

Reverse: TypeAlias = Callable[[Any, PyTree], tuple[PyTree, Array, PyTree]]


def rnn(
    features: int,
    *,
    activation: str = "tanh",
    reverse: bool = False,
    return_state: bool = False,
) -> Layer:
    """The simple recurrent network h_t = act(x_t wx + h_{t-1} wh + b), from (B, T, D) to (B, T, H).

    Parameters: wx (D, H), wh (H, H), beginning orthogonal, b (H,). The state is h (B, H). The
    derivation is with `backhand.ops.elman`. Uses `lengths`.

    Args:
        features: H.
        activation: "tanh" or "relu".
        reverse: from the last step of each sequence to its first.
        return_state: whether the output is (y, state) rather than y.

    Raises:
        ValueError: if features < 1, or for another activation; when run, for x that is not of rank
            3, or a state or lengths that do not fit it.

    Example:
        >>> layer = rnn(16, activation="relu")
        >>> x = jnp.ones((2, 5, 3))
        >>> layer(layer.init(jax.random.key(0), x), x).shape
        (2, 5, 16)

    References:
        Elman, "Finding structure in time", 1990; Le, Jaitly and Hinton, "A simple way to initialize
        recurrent networks of rectified linear units", 2015.
    """
    op = ops.elman.bind(activation=activation, reverse=reverse)
    if activation not in ("tanh", "relu"):
        raise ValueError(f'rnn needs activation "tanh" or "relu", got {activation!r}')

    def reversed_(residuals: Any, dy: PyTree) -> tuple[PyTree, Array, PyTree]:
        dz, h, dstate = elman_deltas(residuals, dy, activation=activation, reverse=reverse)
        dparams = {"wx": Outer(residuals.x, dz), "wh": Outer(h, dz), "b": Total(dz)}
        return dparams, dz, dstate

    return _recurrent("rnn", op, features, 1, (), 1, reversed_, return_state)


def gru(features: int, *, reverse: bool = False, return_state: bool = False) -> Layer:
    """Gated recurrent unit with the reset after the product, from (B, T, D) to (B, T, H).

    Parameters: wx (D, 3 H), wh (H, 3 H), each gate's part beginning orthogonal, b (3 H,) and bn
    (H,), which is inside the reset. The state is h (B, H). The derivation is with
    `backhand.ops.gru`. Uses `lengths`.

    Args:
        features: H.
        reverse: from the last step of each sequence to its first.
        return_state: whether the output is (y, state) rather than y.

    Raises:
        ValueError: if features < 1; when run, for x that is not of rank 3, or a state or lengths
            that do not fit it.

    Example:
        >>> layer = gru(16)
        >>> x = jnp.ones((2, 5, 3))
        >>> layer(layer.init(jax.random.key(0), x), x, lengths=jnp.array([5, 2])).shape
        (2, 5, 16)

    References:
        Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.
    """
    op = ops.gru.bind(reverse=reverse)

    def reversed_(residuals: Any, dy: PyTree) -> tuple[PyTree, Array, PyTree]:
        deltas = gru_deltas(residuals, dy, reverse=reverse)
        weights = {"wx": Outer(residuals.x, deltas.dp), "wh": Outer(deltas.h, deltas.dq)}
        return {**weights, "b": Total(deltas.dp), "bn": deltas.dbn}, deltas.dp, deltas.dstate

    return _recurrent("gru", op, features, 3, ("bn",), 1, reversed_, return_state)


def lstm(features: int, *, reverse: bool = False, return_state: bool = False) -> Layer:
    """Long short-term memory, from (B, T, D) to (B, T, H).

    Parameters: wx (D, 4 H), wh (H, 4 H), each gate's part beginning orthogonal, b (4 H,), beginning
    at one for the forget gate (so that errors reach far at first) and at zero for the others. The
    state is (h, c), each (B, H). The derivation is with `backhand.ops.lstm`. Uses `lengths`.

    Args:
        features: H.
        reverse: from the last step of each sequence to its first.
        return_state: whether the output is (y, state) rather than y.

    Raises:
        ValueError: if features < 1; when run, for x that is not of rank 3, or a state or lengths
            that do not fit it.

    Example:
        >>> layer = lstm(16, return_state=True)
        >>> x = jnp.ones((2, 5, 3))
        >>> params = layer.init(jax.random.key(0), x)
        >>> y, (h, c) = layer(params, x, lengths=jnp.array([5, 2]))
        >>> y.shape, c.shape
        ((2, 5, 16), (2, 16))
        >>> more, _ = layer(params, {"x": x, "state": (h, c)})

    References:
        Jozefowicz, Zaremba and Sutskever, "An empirical exploration of recurrent network
        architectures", 2015.
    """
    op = ops.lstm.bind(reverse=reverse)

    def reversed_(residuals: Any, dy: PyTree) -> tuple[PyTree, Array, PyTree]:
        dz, h, dstate = lstm_deltas(residuals, dy, reverse=reverse)
        dparams = {"wx": Outer(residuals.x, dz), "wh": Outer(h, dz), "b": Total(dz)}
        return dparams, dz, dstate

    return _recurrent("lstm", op, features, 4, (), 2, reversed_, return_state)


def _recurrent(
    name: str,
    op: Op,
    features: int,
    gates: int,
    inner: tuple[str, ...],
    states: int,
    reverse: Reverse,
    return_state: bool,
) -> Layer:
    """A layer from its op.

    `inner` names biases (H,) beside b; `states` is how many arrays a state has; `reverse` gives
    contributions, the error of x wx and that of the state.
    """
    if whole_number(f"{name}'s features", features) < 1:
        raise ValueError(f"{name} needs at least 1 feature, got {features}")

    def init(key: Array, x: PyTree) -> Params:
        x, _ = parts_of(name, x)
        check_sequence(name, x)
        dtype, keys = accumulation_dtype(x.dtype), jax.random.split(key, 1 + gates)
        wh = [orthogonal()(each, (features, features), dtype) for each in keys[1:]]
        b = jnp.zeros((gates, features), dtype)
        return {
            "wx": lecun_normal()(keys[0], (x.shape[-1], gates * features), dtype),
            "wh": jnp.concatenate(wh, axis=1),
            "b": (b.at[1].set(1) if name == "lstm" else b).reshape(-1),
            **{key: jnp.zeros(features, dtype) for key in inner},
        }

    def forward(
        params: Params, x: PyTree, *, lengths: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        x, state = parts_of(name, x)
        own = (params[key] for key in ("wx", "wh", "b", *inner))
        lengths = None if lengths is None else jnp.asarray(lengths)
        y, residuals = op.forward(x, *own, state, lengths)
        return y if return_state else y[0], residuals._replace(**dict.fromkeys(params))

    def rule(params: Params, residuals: Any, dy: PyTree) -> tuple[PyTree, PyTree]:
        x = residuals.x
        error, last = dy if return_state else (dy, None)
        zeros = start(None, x, features).astype(x.dtype)
        none = (zeros,) * states if states > 1 else zeros
        if error is None:
            error = jnp.broadcast_to(zeros[:, None], (*x.shape[:2], features))
        if last is None:
            last = none
        last = jax.tree.map(lambda zeros, given: zeros if given is None else given, none, last)
        dparams, dz, dstate = reverse(residuals._replace(**params), (error, last))
        return dparams, joined(linear_dx(dz, params["wx"], x), dstate)

    return layer(name, init, forward, rule)


def parts_of(name: str, x: PyTree) -> tuple[Any, PyTree]:
    """A sequence and its state, None where there is none.

    Raises:
        TypeError: for a tuple, such as the (y, state) of another layer.
        ValueError: for a dict of other parts.
    """
    if isinstance(x, tuple | list):
        raise TypeError(
            f"{name} needs one array, or a dict of 'x' and 'state', got a {type(x).__name__} of "
            f"{len(x)}; of the (y, state) of another layer, pick(0) goes on with y alone, and "
            "stacked hands on states"
        )
    if isinstance(x, dict) and x.keys() != {"x", "state"}:
        raise ValueError(
            f"{name} needs one array, or a dict of 'x' and 'state', got a dict of {listed(x)}"
        )
    return apart(x)


def apart(x: PyTree) -> tuple[Any, PyTree]:
    """x and the state beside it; None where there is none."""
    return (x["x"], x["state"]) if isinstance(x, dict) else (x, None)


def joined(x: PyTree, state: PyTree) -> PyTree:
    """Undoes `apart`."""
    return x if state is None else {"x": x, "state": state}


def given(y: PyTree) -> tuple[Any, PyTree]:
    """What a layer gives, or its error: y, and the state, None where there is none."""
    return y if isinstance(y, tuple) else (y, None)
