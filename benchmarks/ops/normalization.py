"""Normalizations, both ways, against the same written with `jnp.mean` and `jnp.var`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import backhand as bh
from benchmarks.ops.case import Case, normal, sized
from benchmarks.ops.peer import Prepare, images, one


def wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalized(x: Array, scale: Array, offset: Array, axes: Any) -> Array:
    own = wide(x)
    mean, var = jnp.mean(own, axes, keepdims=True), jnp.var(own, axes, keepdims=True)
    return ((own - mean) * lax.rsqrt(var + 1e-5) * scale + offset).astype(x.dtype)


def layer_norm(x: Array, scale: Array, offset: Array) -> Array:
    return normalized(x, scale, offset, -1)


def batch_norm(x: Array, scale: Array, offset: Array) -> Array:
    return normalized(x, scale, offset, tuple(range(x.ndim - 1)))


def instance_norm(x: Array, scale: Array, offset: Array) -> Array:
    return normalized(x, scale, offset, tuple(range(1, x.ndim - 1)))


def group_norm(x: Array, scale: Array, offset: Array) -> Array:
    grouped = x.reshape(x.shape[0], -1, 8, x.shape[-1] // 8)
    mean, var = jnp.mean(grouped, (1, 3), keepdims=True), jnp.var(grouped, (1, 3), keepdims=True)
    return ((grouped - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * scale + offset


def rms_norm(x: Array, scale: Array) -> Array:
    own = wide(x)
    mean = jnp.mean(jnp.square(own), -1, keepdims=True)
    return (own * lax.rsqrt(mean + 1e-6) * scale).astype(x.dtype)


def weight_standardization(w: Array) -> Array:
    axes = tuple(range(w.ndim - 1))
    mean, var = jnp.mean(w, axes, keepdims=True), jnp.var(w, axes, keepdims=True)
    return (w - mean) * lax.rsqrt(var + 1e-5)


TORCH: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda f, x, w, b: f.layer_norm(x, x.shape[-1:], w, b),
    "rms_norm": lambda f, x, w: f.rms_norm(x, x.shape[-1:], w, 1e-6),
    "batch_norm": lambda f, x, w, b: f.batch_norm(x, None, None, w, b, training=True),
    "instance_norm": lambda f, x, w, b: f.instance_norm(x, weight=w, bias=b),
    "group_norm": lambda f, x, w, b: f.group_norm(x, 8, w, b),
}


def in_torch(name: str, rank: int, dtype: str) -> dict[str, Prepare]:
    """PyTorch wants scales in the dtype of x, so it has no row in bfloat16."""
    if name not in TORCH or dtype != "float32":
        return {}
    rowwise = name in ("layer_norm", "rms_norm") or rank == 2
    return one(TORCH[name]) if rowwise else images(TORCH[name], rank)


def case(theirs: Callable[..., Array], *shape: int, dtype: str = "float32", **how: Any) -> Case:
    name = theirs.__name__
    count = {"rms_norm": 1, "weight_standardization": 0}.get(name, 2)

    def make() -> tuple[Array, ...]:
        own = (normal(shape[-1], seed=1 + i) for i in range(count))
        return normal(*shape, dtype=dtype), *own

    op, torch = getattr(bh.ops, name).bind(**how), in_torch(name, len(shape), dtype)
    return Case(name, sized(*shape), make, op, theirs, torch, dtype)


def masked(*shape: int) -> Case:
    """Batch norm of sequences of which about a fourth is padding."""

    def make() -> tuple[Array, ...]:
        lengths = np.linspace(shape[1] // 2, shape[1], shape[0]).astype(int)
        mask = jnp.asarray(np.arange(shape[1]) < lengths[:, None])
        return normal(*shape), normal(shape[-1], seed=1), normal(shape[-1], seed=2), mask

    def theirs(x: Array, scale: Array, offset: Array, mask: Array) -> Array:
        there, axes = mask[..., None], (0, 1)
        mean = jnp.mean(x, axes, keepdims=True, where=there)
        var = jnp.var(x, axes, keepdims=True, where=there)
        return (x - mean) * lax.rsqrt(var + 1e-5) * scale + offset

    return Case("batch_norm", f"{sized(*shape)}, masked", make, bh.ops.batch_norm, theirs)


def cases() -> Iterator[Case]:
    for norm in (layer_norm, rms_norm):
        yield case(norm, 32, 64)
        yield case(norm, 8, 256, 256)
        yield case(norm, 4, 512, 1024)
        yield case(norm, 4, 512, 1024, dtype="bfloat16")
    yield case(batch_norm, 64, 128)
    yield case(batch_norm, 64, 32, 32, 32)
    yield case(batch_norm, 64, 8, 8, 256)
    yield masked(16, 256, 128)
    for norm, settings in ((group_norm, {"groups": 8}), (instance_norm, {})):
        yield case(norm, 8, 8, 8, 32, **settings)
        yield case(norm, 64, 32, 32, 32, **settings)
        yield case(norm, 16, 16, 16, 256, **settings)
    yield case(weight_standardization, 3, 3, 64, 64)
    yield case(weight_standardization, 3, 3, 512, 512)
