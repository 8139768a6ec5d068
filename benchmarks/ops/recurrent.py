"""LSTM, GRU, the simple recurrent network and the linear recurrence.

The other side of the first three is the scan that an expert writes: the input projected for the
whole sequence before it, one product of the state in it. PyTorch's LSTM, GRU and RNN have two
biases; one of them is zero.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import backhand as bh
from benchmarks.measure import cores
from benchmarks.ops.case import Case, normal
from benchmarks.ops.peer import Prepare, tensor

State = tuple[Array, ...]


def hoisted(
    cell: Callable[..., State], states: int, lengths: Array | None = None, reverse: bool = False
) -> Callable[..., Array]:
    """`cell(state, z, wh, *more) -> state`, h first, scanned over x wx + b.

    After the end of a sequence the state stays and the output is 0.
    """

    def run(x: Array, wx: Array, wh: Array, b: Array, *more: Array) -> Array:
        zeros = jnp.zeros((x.shape[0], wh.shape[0]), x.dtype)
        there = None if lengths is None else jnp.arange(x.shape[1])[:, None] < lengths

        def step(state: State, own: tuple[Array, Array | None]) -> tuple[State, Array]:
            z, keep = own
            new = cell(state, z, wh, *more)
            if keep is None:
                return new, new[0]
            new = tuple(jnp.where(keep[:, None], *both) for both in zip(new, state, strict=True))
            return new, jnp.where(keep[:, None], new[0], 0)

        z = jnp.swapaxes(x @ wx + b, 0, 1)
        _, y = lax.scan(step, (zeros,) * states, (z, there), reverse=reverse)
        return jnp.swapaxes(y, 0, 1)

    return run


def lstm_cell(state: tuple[Array, Array], z: Array, wh: Array) -> tuple[Array, Array]:
    h, c = state
    i, f, g, o = jnp.split(z + h @ wh, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_cell(state: tuple[Array], z: Array, wh: Array, bn: Array) -> tuple[Array]:
    (h,) = state
    (pr, pu, pn), (qr, qu, qn) = jnp.split(z, 3, axis=-1), jnp.split(h @ wh, 3, axis=-1)
    r, u = jax.nn.sigmoid(pr + qr), jax.nn.sigmoid(pu + qu)
    n = jnp.tanh(pn + r * (qn + bn))
    return ((1 - u) * n + u * h,)


def elman_cell(state: tuple[Array], z: Array, wh: Array) -> tuple[Array]:
    return (jnp.tanh(z + state[0] @ wh),)


CELLS = {"lstm": (lstm_cell, 2, 4), "gru": (gru_cell, 1, 3), "elman": (elman_cell, 1, 1)}


def in_torch(name: str) -> dict[str, Prepare]:
    """PyTorch's module with the same weights."""

    def prepare(dy: Any, x: Any, wx: Any, wh: Any, b: Any, bn: Any = None) -> Callable[[], Any]:
        import torch

        torch.set_num_threads(cores())
        makers = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}
        given, error = tensor(x).requires_grad_(), tensor(dy)
        module = makers[name](x.shape[-1], wh.shape[0], batch_first=True, dtype=given.dtype)
        fill(module.parameters(), (wx, wh, b, bn))
        leaves = [given, *module.parameters()]

        def run() -> Any:
            y, _ = module(given)
            return y, torch.autograd.grad(y, leaves, error)

        return run

    return {"": prepare}


def fill(parameters: Any, own: tuple[Any, Any, Any, Any]) -> None:
    """Our weights in a module: of the two biases PyTorch has, the inner is 0 but for a GRU's bn."""
    import torch

    wx, wh, b, bn = own
    inner = np.zeros(b.shape, np.float32)
    if bn is not None:
        inner[-len(bn) :] = bn
    values = tensor(wx).T, tensor(wh).T, tensor(b), torch.from_numpy(inner)
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def weights(name: str, units: int, dtype: str = "float32") -> tuple[Array, ...]:
    """wx, wh, b and a GRU's bn, of as many inputs as units."""
    wide, scale = CELLS[name][2] * units, units**-0.5
    both = (normal(units, wide, seed=i, scale=scale, dtype=dtype) for i in (1, 2))
    b = normal(wide, seed=3, dtype=dtype)
    return (*both, b, normal(units, seed=4, dtype=dtype)) if name == "gru" else (*both, b)


def recurrent(
    name: str,
    steps: int,
    batch: int,
    units: int,
    *,
    ragged: bool = False,
    dtype: str = "float32",
) -> Case:
    cell, states, _ = CELLS[name]
    lengths = np.linspace(steps // 2, steps, batch).astype(np.int32) if ragged else None
    op = getattr(bh.ops, name)
    return Case(
        name,
        f"T{steps} B{batch} D=H={units}{', lengths' if ragged else ''}",
        lambda: (normal(batch, steps, units, dtype=dtype), *weights(name, units, dtype)),
        lambda *arrays: op(*arrays, lengths=lengths)[0],
        hoisted(cell, states, lengths),
        {} if ragged else in_torch(name),
        dtype,
    )


def by_scan(a: Array, b: Array) -> Array:
    def step(h: Array, own: tuple[Array, Array]) -> tuple[Array, Array]:
        h = own[0] * h + own[1]
        return h, h

    steps = jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1)
    return jnp.swapaxes(lax.scan(step, jnp.zeros_like(b[:, 0]), steps)[1], 0, 1)


def by_associative_scan(a: Array, b: Array) -> Array:
    def both(one: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * then[0], then[0] * one[1] + then[1]

    return lax.associative_scan(both, (a, b), axis=1)[1]


def linear(against: str, batch: int, steps: int, width: int) -> Case:
    def make() -> tuple[Array, Array]:
        a = np.random.default_rng(1).uniform(0.8, 1, (batch, steps, width))
        return jnp.asarray(a, jnp.float32), normal(batch, steps, width)

    setting = f"B{batch} T{steps} D{width}, against {against}"
    return Case("linear_recurrence", setting, make, bh.ops.linear_recurrence, RECURRENCES[against])


RECURRENCES = {"a scan": by_scan, "lax.associative_scan": by_associative_scan}


def cases() -> Iterator[Case]:
    large = ((100, 32, 256), (256, 16, 512), (100, 8, 1024))
    for sizes in (*large, (50, 32, 1024), (50, 64, 128), (50, 8, 128), (32, 1, 128)):
        yield recurrent("lstm", *sizes)
    for name in ("gru", "elman"):
        for sizes in large:
            yield recurrent(name, *sizes)
    for name in ("lstm", "gru", "elman"):
        yield recurrent(name, *large[0], ragged=True)
        yield recurrent(name, *large[0], dtype="bfloat16")
    for sizes in ((8, 1024, 256), (32, 256, 512), (1, 4096, 64)):
        for against in RECURRENCES:
            yield linear(against, *sizes)
