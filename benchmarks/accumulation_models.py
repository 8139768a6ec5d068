"""The models and the masked batches that accumulation is measured on."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh

Batch = dict[str, jax.Array]


def classifier(*layers: bh.Layer) -> bh.Objective:
    return bh.objective(bh.chain(*layers), bh.losses.softmax_cross_entropy)


def mlp(*widths: int) -> bh.Objective:
    hidden = [layer for width in widths[:-1] for layer in (bh.dense(width), bh.relu())]
    return classifier(*hidden, bh.dense(widths[-1]))


def masked(rows: int, features: int, classes: int, dtype: Any = jnp.float32) -> Batch:
    """Examples of which about half count, more towards the end, as when texts are packed."""
    rng = np.random.default_rng(0)
    counts = rng.uniform(size=rows) < np.linspace(0.1, 0.9, rows)[rng.permutation(rows)]
    return {
        "inputs": jnp.asarray(rng.normal(size=(rows, features)), dtype),
        "targets": jnp.asarray(rng.integers(0, classes, rows), jnp.int32),
        "weights": jnp.asarray(counts, jnp.float32),
    }


def models() -> Iterator[tuple[str, bh.Objective, int, Batch]]:
    """Models with the size of a micro-batch, and a masked one."""
    wide = mlp(1024, 1024, 10)
    yield "64-64-10", mlp(64, 10), 32, masked(32, 64, 10)
    yield "784-1024-1024-10", wide, 32, masked(32, 784, 10)
    yield "784-1024-1024-10", wide, 256, masked(256, 784, 10)
    block = bh.skip(bh.chain(bh.layer_norm(), bh.dense(1024), bh.gelu(), bh.dense(256)))
    four = classifier(*[block] * 4, bh.dense(10))
    yield "4 x 256-1024-256", four, 128, masked(128, 256, 10)
    deep = classifier(bh.repeat(block, 4), bh.dense(10))
    yield "4 x 256-1024-256 by repeat", deep, 128, masked(128, 256, 10)
    convolutions = [layer for _ in range(2) for layer in (bh.conv(64, (3, 3)), bh.relu())]
    images = classifier(*convolutions, bh.global_average_pool(), bh.dense(10))
    yield "2 convolutions of 64", images, 4, reshaped(masked(4, 16 * 16 * 16, 10), 16, 16, 16)
    recurrent = classifier(bh.lstm(256), bh.global_average_pool(), bh.dense(10))
    yield "LSTM of 256, 32 steps", recurrent, 4, reshaped(masked(4, 32 * 64, 10), 32, 64)


def reshaped(batch: Batch, *shape: int) -> Batch:
    """The batch with each example's inputs in another shape."""
    return {**batch, "inputs": batch["inputs"].reshape(-1, *shape)}
