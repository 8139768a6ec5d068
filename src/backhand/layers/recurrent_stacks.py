"""Recurrent layers together: one from each end of a sequence, one on another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import described, whole_number
from backhand.layers.recurrent import apart, given, joined, parts_of
from backhand.protocol import Layer, output_shape
from backhand.visit import Params, PyTree, gradients


def bidirectional(make: Callable[..., Layer], features: int, **settings: Any) -> Layer:
    """Two recurrent layers, one from each end of the sequence; their features side by side.

    From (B, T, D) to (B, T, 2 H): the first H have seen what came before, the others what comes
    after. The error of x is the sum of both. A state, given or returned, is the pair of theirs.

    Parameters: "ahead" and "back", each those of its layer. Uses `lengths`.

    Args:
        make: `lstm`, `gru` or `rnn`.
        features: H of each.
        settings: other arguments of `make`, all but `reverse`.

    Raises:
        ValueError: for `reverse`, or what `make` refuses.

    Example:
        >>> import backhand as bh
        >>> layer = bidirectional(bh.gru, 8)
        >>> x = jnp.ones((2, 5, 3))
        >>> layer(layer.init(jax.random.key(0), x), x).shape
        (2, 5, 16)

    References:
        Schuster and Paliwal, "Bidirectional recurrent neural networks", 1997.
    """
    if "reverse" in settings:
        raise ValueError(
            "bidirectional reads the sequence from both ends: leave `reverse` out, or use "
            f"{make.__name__}({features}, reverse={settings['reverse']}) for one direction"
        )
    parts: dict[str | int, Layer] = {
        "ahead": make(features, reverse=False, **settings),
        "back": make(features, reverse=True, **settings),
    }

    def inputs(x: PyTree) -> list[PyTree]:
        x, states = parts_of("bidirectional", x)
        if states is None:
            return [x, x]
        if not isinstance(states, tuple) or len(states) != 2:
            raise ValueError(
                "bidirectional needs a state for each direction, a tuple (ahead, back); got "
                f"{described(states)}"
            )
        return [joined(x, state) for state in states]

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        keys, xs = jax.random.split(key), inputs(x)
        return {name: part.init(keys[i], xs[i]) for i, (name, part) in enumerate(parts.items())}

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, PyTree]:
        results = {
            name: part.forward(params[name], own, **side)
            for (name, part), own in zip(parts.items(), inputs(x), strict=True)
        }
        outputs, states = zip(*(given(y) for y, _ in results.values()), strict=True)
        y = jnp.concatenate(outputs, -1)
        saved = {name: residuals for name, (_, residuals) in results.items()}
        return (y if states[0] is None else (y, states)), saved

    def backward(
        params: Params, residuals: PyTree, dy: PyTree, collect: Any = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        dy, states = given(dy)
        collected, errors = {}, []
        for i, (name, part) in enumerate(parts.items()):
            error = None if dy is None else dy[..., i * features : (i + 1) * features]
            error = error if states is None else (error, states[i])
            collected[name], dx = part.backward(
                params[name], residuals[name], error, collect, **side
            )
            errors.append(apart(dx))
        (ahead, first), (back, second) = errors
        if ahead is None or back is None:  # no blame came in
            return collected, None
        return collected, joined(ahead + back, None if first is None else (first, second))

    uses = parts["ahead"].uses
    return Layer("bidirectional", init, forward, backward, uses, parts)


def stacked(make: Callable[..., Layer], features: int, layers: int, **settings: Any) -> Layer:
    """Recurrent layers one on another, each reading the output of the one below, from x to y.

    A state, given or returned, is the tuple of theirs, from the first layer to the last, which a
    `chain` does not hand on. Without states it is a chain.

    Parameters: a tuple of the layers'. Uses `lengths`.

    Args:
        make: `lstm`, `gru` or `rnn`; of both directions, `functools.partial(bidirectional, lstm)`.
        features: H of each.
        layers: their number.
        settings: other arguments of `make`, such as `return_state`.

    Raises:
        ValueError: for no layers, or what `make` refuses; when run, for another number of states.

    Example:
        >>> import backhand as bh
        >>> layer = stacked(bh.lstm, 8, layers=2, return_state=True)
        >>> x = jnp.ones((2, 5, 3))
        >>> params = layer.init(jax.random.key(0), x)
        >>> y, states = layer(params, x)
        >>> y.shape, len(states)
        ((2, 5, 8), 2)
        >>> more, _ = layer(params, {"x": x, "state": states})

    References:
        Graves, Mohamed and Hinton, "Speech recognition with deep recurrent neural networks", 2013.
    """
    if whole_number("layers", layers) < 1:
        raise ValueError(f"stacked needs at least 1 layer, got {layers}")
    stack = [make(features, **settings) for _ in range(layers)]

    def inputs(x: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
        x, states = parts_of("stacked", x)
        if states is None:
            return x, (None,) * layers
        if not isinstance(states, tuple) or len(states) != layers:
            raise ValueError(
                f"stacked needs a tuple of {layers} states, one for each layer, got "
                f"{described(states)}"
            )
        return x, states

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        x, states = inputs(x)
        params: list[Params] = []
        for i, part in enumerate(stack):
            own = joined(x, states[i])
            params.append(part.init(jax.random.fold_in(key, i), own))
            x, _ = given(output_shape(part, params[i], own))
        return tuple(params)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, PyTree]:
        y, states = inputs(x)
        saved, last = [], []
        for i, part in enumerate(stack):
            y, residuals = part.forward(params[i], joined(y, states[i]), **side)
            y, state = given(y)
            saved.append(residuals)
            last.append(state)
        return y if last[0] is None else (y, tuple(last)), tuple(saved)

    def backward(
        params: Params, residuals: PyTree, dy: PyTree, collect: Any = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        dy, dlast = given(dy)
        collected: list[PyTree] = []
        states: list[PyTree] = []
        for i, part in reversed(list(enumerate(stack))):
            error = dy if dlast is None else (dy, dlast[i])
            own, dx = part.backward(params[i], residuals[i], error, collect, **side)
            dy, dstate = apart(dx)
            collected.insert(0, own)
            states.insert(0, dstate)
        return tuple(collected), joined(dy, None if states[0] is None else tuple(states))

    return Layer("stacked", init, forward, backward, stack[0].uses, dict(enumerate(stack)))
