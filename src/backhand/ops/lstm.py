"""Long short-term memory.

With z = x_t wx + h_{t-1} wh + b in four parts, s the sigmoid:

    i = s(z_i)    f = s(z_f)    g = tanh(z_g)    o = s(z_o)
    c_t = f c_{t-1} + i g
    h_t = o tanh(c_t)

The error of h_t comes from above and from the next step, that of c_t from h_t and from the next
step. With dh and dc those sums:

    dc += dh o (1 - tanh(c_t)^2)
    dz_i = dc g i (1 - i)                dz_f = dc c_{t-1} f (1 - f)
    dz_g = dc i (1 - g^2)                dz_o = dh tanh(c_t) o (1 - o)
    dh_{t-1} = dz wh^T                   dc_{t-1} = dc f

Along c an error is only multiplied by f: a gate near 1 hands it on whole, over many steps. The
reverse scan keeps dz alone. After it, one product each:

    dwx = sum_t x_t dz_t     dwh = sum_t h_{t-1} dz_t     db = sum_t dz_t     dx_t = dz_t wx^T
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from backhand.arrays import by_batch, described, like_primal, upcast, whole
from backhand.contributions import Outer, Total, total
from backhand.ops.linear import linear_dx
from backhand.ops.recurrent import (
    check,
    chosen,
    kept,
    projected,
    start,
    sweep_of,
    within,
)
from backhand.protocol import Op
from backhand.visit import PyTree

State: TypeAlias = tuple[Float[Array, "B H"], Float[Array, "B H"]]


class Residuals(NamedTuple):
    """What came in, and the gates and states of every step; tanh(c) is computed again."""

    x: Float[Array, "B T D"]
    wx: Float[Array, "D G"]
    wh: Float[Array, "H G"]
    b: Float[Array, " G"]
    state: State | None
    lengths: Integer[Array, " B"] | None
    gates: Float[Array, "T _ _"]
    h: Float[Array, "T _ _"]
    c: Float[Array, "T _ _"]


class Deltas(NamedTuple):
    """The errors that a reverse scan leaves: of z (B, T, 4 H) and of the initial state.

    `h` (B, T, H) is the state that each step began with, the other factor of dwh.
    """

    dz: Float[Array, "B T G"]
    h: Float[Array, "B T H"]
    dstate: State | None


def lstm_forward(
    x: Float[Array, "B T D"],
    wx: Float[Array, "D G"],
    wh: Float[Array, "H G"],
    b: Float[Array, " G"],
    state: State | None = None,
    lengths: Integer[Array, " B"] | None = None,
    *,
    reverse: bool = False,
) -> tuple[tuple[Float[Array, "B T H"], State], Residuals]:
    """LSTM over a batch of sequences; see the top of the file for equations and derivatives.

    A sigmoid is computed as (1 + tanh(z / 2)) / 2, so that one tanh serves all gates; the halves go
    into the weights, exactly. In low precision the states are carried in float32.

    Both ways on 2 CPU cores it takes 0.51 to 0.91 of the time and 0.43 to 0.57 of the memory
    of `jax.grad` through a scan with the input projected before it.

    Args:
        x: inputs (B, T, D).
        wx: weights of the input (D, 4 H), the gates in the order i, f, g, o.
        wh: weights of the state (H, 4 H).
        b: bias (4 H,).
        state: (h, c) before the first step, each (B, H); zeros if None.
        lengths: integers (B,) in [0, T]: after the end of a sequence the state stays as it is and
            the output is zero. None takes all steps. Known ones are checked; inside a jit, which
            cannot, one below 0 is 0 and one above T is T.
        reverse: from the last step of each sequence to its first.

    Returns:
        y (B, T, H), and the state (h, c) after the last step.

    Raises:
        TypeError: for a floating-point argument that is not, or lengths that are not integers.
        ValueError: for shapes that do not fit, or lengths outside [0, T] where they are known.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x, wx, wh, b = jnp.ones((2, 5, 3)), jnp.ones((3, 16)), jnp.ones((4, 16)), jnp.zeros(16)
        >>> y, (h, c) = bh.ops.lstm(x, wx, wh, b, lengths=jnp.array([5, 2]))
        >>> y.shape, h.shape, bool((h[1] == y[1, 1]).all()), float(y[1, 2:].sum())
        ((2, 5, 4), (2, 4), True, 0.0)

    References:
        Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers, Schmidhuber and Cummins,
        "Learning to forget", 1999.
    """
    given: Any = state
    if given is not None and not (isinstance(given, tuple) and len(given) == 2):
        raise ValueError(
            f"lstm needs its state as a pair (h, c), each of shape (B, H), got {described(given)}"
        )
    h0, c0 = (None, None) if state is None else state
    check("lstm", 4, x, (wx, wh), {"b": (b, 4)}, {"h": h0, "c": c0}, lengths)
    units = wh.shape[0]
    sweep, keep = sweep_of(x, wh, reverse), kept(lengths, x.shape[1])
    x = within(keep, by_batch(x))
    half = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], x.dtype), units)
    scaled = [whole(w).astype(x.dtype) * half[None] for w in (wx, wh)]
    z = projected(x, scaled[0], whole(b).astype(x.dtype) * half)
    recur, slope = sweep.times(scaled[1]), upcast(half)[None]

    def step(carry: State, own: PyTree) -> tuple[State, PyTree]:
        (h, c), (z, keep) = carry, own
        gates = slope * jnp.tanh(upcast(z) + recur(h.astype(x.dtype))) + (1 - slope)
        i, f, g, o = jnp.split(gates, 4, 1)
        c = chosen(keep, f * c + i * g, c)
        h = chosen(keep, o * jnp.tanh(c), h)
        return (h, c), (gates.astype(x.dtype), h.astype(x.dtype), c)

    first = [start(each, x, units) for each in (h0, c0)]
    last, saved = sweep.run(step, tuple(first), (z, keep))
    h, c = (each.astype(x.dtype) for each in last)
    y = within(keep, saved[1])
    return (y, (h, c)), Residuals(x, wx, wh, b, state, lengths, *saved)


def lstm_backward(
    residuals: Residuals, dy: tuple[Float[Array, "B T H"], State], *, reverse: bool = False
) -> PyTree:
    x, wx, wh, b, *_ = residuals
    dz, h, dstate = lstm_deltas(residuals, dy, reverse=reverse)
    dwx, dwh, db = total(Outer(x, dz), wx), total(Outer(h, dz), wh), total(Total(dz), b)
    return linear_dx(dz, wx, x), dwx, dwh, db, dstate, None


def lstm_deltas(
    residuals: Residuals, dy: tuple[Float[Array, "B T H"], State], *, reverse: bool
) -> Deltas:
    """The reverse scan."""
    x, _, wh, _, state, lengths, gates, hs, cs = residuals
    units = wh.shape[0]
    sweep, keep = sweep_of(x, wh, reverse), kept(lengths, x.shape[1])
    recur = sweep.times(whole(wh).astype(x.dtype).T)
    h0, c0 = (None, None) if state is None else state
    before = sweep.before(start(c0, x, units), cs)

    def step(carry: State, own: PyTree) -> tuple[State, Array]:
        (dh, dc), (dy, gates, c, tanh_c, keep) = carry, own
        i, f, g, o = jnp.split(upcast(gates), 4, 1)
        dh_t = dh + upcast(dy)
        dc_t = dc + dh_t * o * (1 - tanh_c * tanh_c)
        parts = [
            dc_t * g * (i * (1 - i)),
            dc_t * c * (f * (1 - f)),
            dc_t * i * (1 - g * g),
            dh_t * tanh_c * (o * (1 - o)),
        ]
        dz = jnp.concatenate(parts, 1)
        dz = chosen(keep, dz, jnp.zeros_like(dz)).astype(x.dtype)
        return (chosen(keep, recur(dz), dh), chosen(keep, dc_t * f, dc)), dz

    error, last = within(keep, dy[0]), tuple(upcast(each) for each in dy[1])
    own = (error, gates, before, jnp.tanh(cs), keep)
    first, dz = sweep.back(step, last, own)
    h = sweep.before(start(h0, x, units), hs)
    dstate = None
    if state is not None:
        dstate = (like_primal(first[0], state[0]), like_primal(first[1], state[1]))
    return Deltas(dz, h, dstate)


def lstm_reference(
    x: Array,
    wx: Array,
    wh: Array,
    b: Array,
    state: State | None = None,
    lengths: Array | None = None,
    *,
    reverse: bool = False,
) -> tuple[Array, State]:
    wx, wh, b = (array.astype(x.dtype) for array in (wx, wh, b))
    zeros = jnp.zeros((x.shape[0], wh.shape[0]), x.dtype)
    h0, c0 = (zeros, zeros) if state is None else (each.astype(x.dtype) for each in state)
    if lengths is None:
        lengths = jnp.full(x.shape[0], x.shape[1])

    def step(carry: State, own: tuple[Array, Array]) -> tuple[State, Array]:
        (h, c), (x, t) = carry, own
        i, f, g, o = jnp.split(x @ wx + h @ wh + b[None], 4, axis=-1)
        new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
        keep = (t < lengths)[:, None]
        carry = jnp.where(keep, new_h, h), jnp.where(keep, new_c, c)
        return carry, jnp.where(keep, new_h, jnp.zeros_like(h))

    steps = jnp.arange(x.shape[1], dtype=lengths.dtype)
    last, y = lax.scan(step, (h0, c0), (jnp.swapaxes(x, 0, 1), steps), reverse=reverse)
    return jnp.swapaxes(y, 0, 1), last


lstm = Op("lstm", lstm_forward, lstm_backward, lstm_reference)
