"""The output layer and its cross-entropy, both ways, against two forms that an expert writes.

"whole logits" makes them all; "chunks" is short of memory: it scans over chunks of rows under
`jax.checkpoint`, so that the logits of one chunk are there at a time, both ways.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import backhand as bh
from benchmarks.ops.case import Case, integers, normal, summed

SIZES = ((512, 64, 1000), (64, 256, 32000), (2048, 128, 256), (1024, 256, 8192), (4096, 256, 32000))
CHUNK = 512
Losses = Callable[[Array, Array, Array], Array]


def plain(x: Array, w: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)


def capped(x: Array, table: Array, labels: Array) -> Array:
    """Of a tied table, with a soft cap and a z-loss."""
    logits = 30.0 * jnp.tanh(x @ table.T / 30.0)
    log_sum = jax.nn.logsumexp(logits, -1)
    true = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return log_sum - true + 1e-4 * log_sum**2


def by_chunks(losses: Losses, x: Array, w: Array, labels: Array) -> tuple[Array, Array]:
    """Their sum over chunks of rows, whose logits are made again on the way back."""

    @jax.checkpoint
    def step(total: Array, own: tuple[Array, Array]) -> tuple[Array, None]:
        rows, ids = own
        return total + jnp.sum(losses(rows, w, ids)), None

    chunks = x.reshape(-1, CHUNK, x.shape[1]), labels.reshape(-1, CHUNK)
    total, _ = lax.scan(step, jnp.zeros((), x.dtype), chunks)
    return total, jnp.asarray(labels.size, x.dtype)


def case(against: str, rows: int, features: int, words: int, tied: bool = False) -> Case:
    def make() -> tuple[Array, ...]:
        shape = (words, features) if tied else (features, words)
        w = normal(*shape, seed=1, scale=features**-0.5)
        return normal(rows, features), w, integers(0, words, rows)

    ours, losses, how = bh.losses.linear_cross_entropy, plain, ""
    if tied:
        ours, losses = ours.bind(tied=True, soft_cap=30.0, z_loss=1e-4), capped
        how = ", tied, soft cap, z-loss"
    forms = {"whole logits": summed(losses), "chunks": functools.partial(by_chunks, losses)}
    setting = f"{rows} x {features} x {words}{how}, against {against}"
    return Case("linear_cross_entropy", setting, make, ours, forms[against])


def cases() -> Iterator[Case]:
    for sizes in SIZES:
        yield case("whole logits", *sizes)
    for sizes in SIZES[-2:]:
        yield case("chunks", *sizes)
    for against in ("whole logits", "chunks"):
        yield case(against, *SIZES[-1], tied=True)
