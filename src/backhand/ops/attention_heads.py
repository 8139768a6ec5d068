"""A function of one key head, for all heads of all examples.

On CPU in turn: products of matrices, few scores in the cache at a time, memory of one head. Where
there are few scores, one device works on many heads at a time, or an explicit mesh splits the
batch, all at once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import varying
from backhand.ops.attention_blocks import Head

OfHead: TypeAlias = Callable[..., tuple[Any, Array | None]]


def at_once(f: OfHead, head: Head, *more: Any) -> tuple[Any, Array | None]:
    """`f(head, *more)` of all heads side by side.

    `f` gives any arrays, and the error of the bias or None. What goes in has leading axes (B or 1,
    K or 1); the arrays come out with (B, K), the error of the bias summed as the bias was shared.
    """
    batch, heads = head.k.shape[:2]
    result, dbias = _vmap(functools.partial(_vmap, f, heads), batch, head, *more)
    if dbias is not None:
        shared = [axis for axis in (0, 1) if head.bias.shape[axis] != dbias.shape[axis]]
        dbias = jnp.sum(dbias, shared, keepdims=True)
    return result, dbias


def in_turn(f: OfHead, head: Head, *more: Any, size: int) -> tuple[Any, Array | None]:
    """The same, about `size` heads at a time.

    A bias that heads share is not copied for each, nor is its error kept for each.
    """
    lead = head.k.shape[:2]
    count = math.prod(lead)
    shared = head.bias is not None and head.bias.shape[:2] != lead

    def flat(x: Array) -> Array:
        return jnp.broadcast_to(x, lead + x.shape[2:]).reshape(count, *x.shape[2:])

    def unflat(x: Array) -> Array:
        return x.reshape(*lead, *x.shape[1:])

    if shared:
        xs = jax.tree.map(flat, (head._replace(bias=None), *more))
        result, dbias = _sharing(f, head.bias, xs, lead)
        return jax.tree.map(unflat, result), dbias
    xs = jax.tree.map(flat, (head, *more))
    if count <= size:
        return jax.tree.map(unflat, jax.vmap(f)(*xs))
    size = max(d for d in range(1, max(1, size) + 1) if count % d == 0)
    stacked = lax.map(lambda x: f(*x), xs, batch_size=size if size > 1 else None)
    return jax.tree.map(unflat, stacked)


def _sharing(f: OfHead, bias: Array, xs: Any, lead: tuple[int, ...]) -> tuple[Any, Array | None]:
    """`f` of one head after the other; the error of the bias that several share is added up."""
    table = bias.reshape(-1, *bias.shape[2:])
    index = jnp.arange(table.shape[0], dtype=jnp.int32).reshape(bias.shape[:2])
    index = jnp.broadcast_to(index, lead).reshape(-1)
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
    head, *more = jax.tree.map(one, xs)
    error = jax.eval_shape(f, head._replace(bias=one(table)), *more)[1]
    total = None if error is None else varying(jnp.zeros(table.shape, error.dtype), xs, table)

    def step(total: Array | None, x: Any) -> tuple[Array | None, Any]:
        at, (head, *more) = x
        row = lax.dynamic_index_in_dim(table, at, keepdims=False)
        result, dbias = f(head._replace(bias=row), *more)
        if dbias is not None:
            added = lax.dynamic_index_in_dim(total, at, keepdims=False) + dbias
            total = lax.dynamic_update_index_in_dim(total, added, at, 0)
        return total, result

    total, result = lax.scan(step, total, (index, xs))
    return result, None if total is None else total.reshape(bias.shape)


def _vmap(f: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """`jax.vmap` over leading axes, where one of length 1 stands for all."""
    one = jax.tree.map(lambda x: x.shape[0] != count, arguments)
    own = jax.tree.map(lambda x, one: x[0] if one else x, arguments, one)
    return jax.vmap(f, jax.tree.map(lambda one: None if one else 0, one))(*own)
