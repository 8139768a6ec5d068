"""A function of one key head, for all heads of all examples.

On CPU in turn: products of matrices, few scores in the cache at a time, memory of one head. Where
there are few scores, one device works on many heads at a time, or an explicit mesh splits the
batch, all at once.

What has features comes and goes by token, (B, T, K, ...) or (B, S, K, D), as it is outside. A head
in turn is cut out of that, and its results are put there, with fewer copies of all heads. Where its
blocks are `sliced`, each with its own keys, heads are made contiguous first, as every block copies
its slice (8 causal heads of 64 features, 1,024 tokens: 0.85 of the time). Numbers of rows are
(B, K, R), and bias, mask and segments have leading axes (B or 1, K or 1). So `f` gives arrays
(T, ...) or (R,), and the error of the bias or None.
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

    The error of the bias is summed as the bias was shared.
    """
    batch, heads = head.k.shape[0], head.k.shape[2]
    result, dbias = _vmap(functools.partial(_vmap, f, heads), batch, *_by_head(head, *more))
    if dbias is not None:
        shared = [axis for axis in (0, 1) if head.bias.shape[axis] != dbias.shape[axis]]
        dbias = jnp.sum(dbias, shared, keepdims=True)
    return jax.tree.map(_by_token, result), dbias


def in_turn(f: OfHead, head: Head, *more: Any, size: int, sliced: bool) -> tuple[Any, Array | None]:
    """The same, about `size` heads at a time, or one where they share a bias.

    That is not copied for each, nor is its error kept for each.
    """
    lead = head.k.shape[0], head.k.shape[2]
    count = math.prod(lead)
    shared = head.bias is not None and head.bias.shape[:2] != lead
    if count == 0:
        return at_once(f, head, *more)
    size = max(d for d in range(1, max(1, size) + 1) if count % d == 0)
    if shared or (size == 1 and not sliced):
        return _one_by_one(f, head, *more, sliced=sliced)

    def flat(x: Array) -> Array:
        return jnp.broadcast_to(x, lead + x.shape[2:]).reshape(count, *x.shape[2:])

    xs = jax.tree.map(flat, _by_head(head, *more))
    if count <= size:
        stacked, dbias = jax.vmap(f)(*xs)
    else:
        stacked, dbias = lax.map(lambda x: f(*x), xs, batch_size=size if size > 1 else None)
    result, dbias = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), (stacked, dbias))
    return jax.tree.map(_by_token, result), dbias


def _one_by_one(f: OfHead, head: Head, *more: Any, sliced: bool) -> tuple[Any, Array | None]:
    """`f` of one head after the other; the error of a bias that several share is added up.

    Differentiated automatically, it adds up an array of all heads at every head: of 128 heads of
    384 tokens the way back takes 2 to 4 times as long as that of a map. The rule does not.
    """
    (batch, _, heads, _), bias = head.k.shape, head.bias
    head, *rest = _by_head(head, *more) if sliced else (head, *more)
    xs = head._replace(bias=None), rest

    def axes(ndim: int) -> tuple[int, int]:
        return (0, 1) if sliced or ndim < 4 else (0, 2)

    def of_index(at: Array) -> tuple[Any, Array | None]:
        where = at // heads, at % heads
        own, rest = jax.tree.map(lambda x: _cut(x, where, axes(x.ndim)), xs)
        own_bias = None if bias is None else _cut(bias, where, (0, 1))
        return f(own._replace(bias=own_bias), *rest)

    def found_in(one: Any) -> Array:
        at = axes(one.ndim + 2)
        sizes = iter(one.shape)
        lead = dict(zip(at, (batch, heads), strict=True))
        shape = [lead[i] if i in lead else next(sizes) for i in range(one.ndim + 2)]
        return jnp.zeros(shape, one.dtype)

    one, error = jax.eval_shape(of_index, jax.ShapeDtypeStruct((), jnp.int32))
    found = jax.tree.map(found_in, one)
    total = None if error is None else jnp.zeros(bias.shape, error.dtype)

    def step(at: Array, carry: Any) -> Any:
        (found, total), at = carry, at.astype(jnp.int32)
        where = at // heads, at % heads
        own, dbias = of_index(at)
        found = jax.tree.map(lambda x, own: _put(x, own, where, axes(x.ndim)), found, own)
        if dbias is not None:
            total = _put(total, dbias + _cut(total, where, (0, 1)), where, (0, 1))
        return found, total

    found, total = lax.fori_loop(0, batch * heads, step, varying((found, total), xs, bias))
    return jax.tree.map(_by_token, found) if sliced else found, total


def _cut(x: Array, where: tuple[Array, Array], axes: tuple[int, int]) -> Array:
    """The part at an index of two axes; one of length 1 stands for all."""
    sizes = [1 if axis in axes else own for axis, own in enumerate(x.shape)]
    part = lax.dynamic_slice(x, _starts(x, where, axes), sizes)
    return lax.squeeze(part, axes)


def _put(x: Array, part: Array, where: tuple[Array, Array], axes: tuple[int, int]) -> Array:
    """The array with that part in place of its own."""
    return lax.dynamic_update_slice(x, lax.expand_dims(part, axes), _starts(x, where, axes))


def _starts(x: Array, where: tuple[Array, Array], axes: tuple[int, int]) -> list[Any]:
    at, zero = dict(zip(axes, where, strict=True)), jnp.int32(0)
    moves = [axis in at and x.shape[axis] > 1 for axis in range(x.ndim)]
    return [at[axis] if own else zero for axis, own in enumerate(moves)]


def _by_head(head: Head, *more: Any) -> Any:
    """The same with leading axes (B or 1, K or 1) all through."""
    own = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1) if x.ndim > 3 else x, (head[:3], more))
    (q, k, v), rest = own
    return head._replace(q=q, k=k, v=v), *rest


def _by_token(x: Array) -> Array:
    """(B, K, T, ...) as (B, T, K, ...), and (B, K, R) as it is."""
    return jnp.moveaxis(x, 1, 2) if x.ndim > 3 else x


def _vmap(f: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """`jax.vmap` over leading axes, where one of length 1 stands for all."""
    one = jax.tree.map(lambda x: x.shape[0] != count, arguments)
    own = jax.tree.map(lambda x, one: x[0] if one else x, arguments, one)
    return jax.vmap(f, jax.tree.map(lambda one: None if one else 0, one))(*own)
