"""Linear maps, activations, dropout, tables, positions, against `jax.nn` and `jax.numpy`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import backhand as bh
from benchmarks.ops.case import Case, integers, normal
from benchmarks.ops.peer import one

SIZES = ((64, 64), (1024, 1024), (4096, 512))
ACTIVATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (jax.nn.relu, lambda f, x: f.relu(x)),
    "leaky_relu": (jax.nn.leaky_relu, lambda f, x: f.leaky_relu(x)),
    "elu": (jax.nn.elu, lambda f, x: f.elu(x)),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), lambda f, x: f.gelu(x)),
    "silu": (jax.nn.silu, lambda f, x: f.silu(x)),
    "sigmoid": (jax.nn.sigmoid, lambda f, x: x.sigmoid()),
    "softplus": (jax.nn.softplus, lambda f, x: f.softplus(x)),
    "tanh": (jnp.tanh, lambda f, x: x.tanh()),
    "softmax": (jax.nn.softmax, lambda f, x: f.softmax(x, -1)),
}
RATE = 0.1
BASE = 10000.0


def linear(rows: int, features: int, dtype: str = "float32") -> Case:
    def make() -> tuple[Array, ...]:
        shapes = (rows, features), (features, features), (features,)
        return tuple(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))

    return Case(
        "linear",
        f"{rows} x {features} x {features}",
        make,
        bh.ops.linear,
        lambda x, w, b: x @ w + b,
        one(lambda f, x, w, b: x @ w + b),
        dtype,
    )


def activation(name: str, rows: int, features: int) -> Case:
    theirs, torch = ACTIVATIONS[name]
    return Case(
        name,
        f"{rows} x {features}",
        lambda: (normal(rows, features),),
        getattr(bh.ops, name),
        theirs,
        one(torch),
    )


def dropout(rows: int, features: int) -> Case:
    """Each side draws a mask of its own, so each has its own truth."""

    def theirs(x: Array, key: Array) -> Array:
        keep = jax.random.bernoulli(key, np.float32(1 - RATE), x.shape)
        return jnp.where(keep, x / (1 - RATE), 0)

    return Case(
        "dropout",
        f"{rows} x {features}, rate {RATE}",
        lambda: (normal(rows, features), jax.random.key(0)),
        bh.ops.dropout.bind(rate=RATE),
        theirs,
        reference=lambda x, key: bh.ops.dropout.reference(x, key, rate=RATE),
    )


def embedding(rows: int, words: int, features: int) -> Case:
    return Case(
        "embedding",
        f"{rows} of {words} x {features}",
        lambda: (normal(words, features), integers(0, words, rows)),
        bh.ops.embedding,
        lambda table, ids: jnp.take(table, ids, axis=0),
        one(lambda f, table, ids: f.embedding(ids, table)),
    )


def rotary(batch: int, tokens: int, heads: int, features: int, dtype: str = "float32") -> Case:
    def theirs(x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        rates = BASE ** (-jnp.arange(0, features, 2, dtype=wide.dtype) / features)
        angle = jnp.arange(tokens, dtype=wide.dtype)[:, None, None] * rates
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        first, second = jnp.split(wide, 2, axis=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return jnp.concatenate(turned, -1).astype(x.dtype)

    return Case(
        "rotary",
        f"{batch}x{tokens}x{heads}x{features}",
        lambda: (normal(batch, tokens, heads, features, dtype=dtype),),
        bh.ops.rotary,
        theirs,
        dtype=dtype,
    )


def sinusoidal(batch: int, tokens: int, features: int) -> Case:
    def theirs(x: Array) -> Array:
        rates = BASE ** (-jnp.arange(0, features, 2) / features)
        angle = jnp.arange(tokens)[:, None] * rates
        return x + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1).astype(x.dtype)

    return Case(
        "sinusoidal",
        f"{batch}x{tokens}x{features}",
        lambda: (normal(batch, tokens, features),),
        bh.ops.sinusoidal,
        theirs,
    )


def cases() -> Iterator[Case]:
    for sizes in SIZES:
        yield linear(*sizes)
    yield linear(1024, 1024, "bfloat16")
    for sizes in SIZES[::2]:
        for name in ACTIVATIONS:
            yield activation(name, *sizes)
        yield dropout(*sizes)
    for table in ((256, 1000, 64), (8192, 32000, 256)):
        yield embedding(*table)
    for shape in ((8, 64, 4, 32), (4, 1024, 8, 64)):
        yield rotary(*shape)
    yield rotary(4, 1024, 8, 64, "bfloat16")
    for places in ((8, 64, 64), (8, 512, 512)):
        yield sinusoidal(*places)
