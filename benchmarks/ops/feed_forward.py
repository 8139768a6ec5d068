"""Gated units, feed-forward blocks and the mixture of experts.

The mixture is measured against two forms that an expert writes: dispatch by one-hot products, as in
GShard, and by gathering rows at sorted indices.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import backhand as bh
from benchmarks.ops.case import Case, normal
from benchmarks.ops.peer import one

EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
UNITS: dict[str, tuple[Callable[[Array], Array], Callable[..., Any]]] = {
    "glu": (jax.nn.sigmoid, lambda f, g, v: g.sigmoid() * v),
    "swiglu": (jax.nn.silu, lambda f, g, v: f.silu(g) * v),
    "geglu": (EXACT_GELU, lambda f, g, v: f.gelu(g) * v),
    "gated": (jax.nn.relu, lambda f, g, v: f.relu(g) * v),
}


# Gated units and blocks ---------------------------------------------------------------------------


def unit(name: str, rows: int, features: int) -> Case:
    act, torch = UNITS[name]
    ours, how = getattr(bh.ops, name), ""
    if name == "gated":
        ours, how = ours.bind(activation="relu"), ", relu"
    return Case(
        name,
        f"{rows} x {features}{how}",
        lambda: (normal(rows, features, seed=0), normal(rows, features, seed=1)),
        ours,
        lambda g, v: act(g) * v,
        one(torch),
    )


def mlp(rows: int, features: int, hidden: int) -> Case:
    layer = bh.differentiable(bh.mlp(hidden))

    def make() -> tuple[Array, ...]:
        return (
            normal(rows, features, seed=0),
            normal(features, hidden, seed=1, scale=features**-0.5),
            normal(hidden, seed=2),
            normal(hidden, features, seed=3, scale=hidden**-0.5),
            normal(features, seed=4),
        )

    def ours(x: Array, w1: Array, b1: Array, w2: Array, b2: Array) -> Array:
        return layer({"hidden": {"w": w1, "b": b1}, "out": {"w": w2, "b": b2}}, x)

    def theirs(x: Array, w1: Array, b1: Array, w2: Array, b2: Array) -> Array:
        return EXACT_GELU(x @ w1 + b1) @ w2 + b2

    torch = one(lambda f, x, w1, b1, w2, b2: f.gelu(x @ w1 + b1) @ w2 + b2)
    return Case("mlp", f"{rows} x {features} x {hidden}", make, ours, theirs, torch)


def gated_mlp(rows: int, features: int, hidden: int) -> Case:
    layer = bh.differentiable(bh.gated_mlp(hidden))
    wide, narrow = features**-0.5, hidden**-0.5

    def make() -> tuple[Array, ...]:
        return (
            normal(rows, features, seed=0),
            normal(features, hidden, seed=1, scale=wide),
            normal(features, hidden, seed=2, scale=wide),
            normal(hidden, features, seed=3, scale=narrow),
        )

    def ours(x: Array, gate: Array, value: Array, out: Array) -> Array:
        return layer({"w_gate": gate, "w_value": value, "w_out": out}, x)

    def theirs(x: Array, gate: Array, value: Array, out: Array) -> Array:
        return (jax.nn.silu(x @ gate) * (x @ value)) @ out

    setting = f"{rows} x {features} x {hidden}"
    torch = one(lambda f, x, gate, value, out: (f.silu(x @ gate) * (x @ value)) @ out)
    return Case("gated_mlp", setting, make, ours, theirs, torch)


# Mixture of experts -------------------------------------------------------------------------------


def routed(x: Array, router: Array, top_k: int) -> tuple[Array, Array, Array]:
    """Weights and experts of each token's choices, and the balance."""
    p, experts = jax.nn.softmax(x @ router), router.shape[1]
    best, chosen = lax.top_k(p, top_k)
    share = jnp.mean(jax.nn.one_hot(chosen, experts), (1, 2))
    w = best / jnp.sum(best, -1, keepdims=True) if top_k > 1 else best
    return w, chosen, experts * jnp.sum(share * jnp.mean(p, 1), -1)


def by_products(
    top_k: int, x: Array, router: Array, w_in: Array, w_out: Array
) -> tuple[Array, Array]:
    """Dispatch and combine by (T, E, C) tensors."""
    (batch, tokens, _), experts = x.shape, router.shape[1]
    capacity = math.ceil(1.25 * top_k * tokens / experts)
    w, chosen, balance = routed(x, router, top_k)
    one_hot = jax.nn.one_hot(jnp.swapaxes(chosen, 1, 2), experts)
    flat = one_hot.reshape(batch, top_k * tokens, experts)
    rank = (jnp.cumsum(flat, 1) - flat).reshape(one_hot.shape)
    place = jax.nn.one_hot(jnp.sum(rank * one_hot, -1).astype(int), capacity)
    combine = jnp.einsum("btk,bkte,bktc->btec", w, one_hot, place)
    rows = jnp.einsum("btec,btd->ebcd", (combine > 0).astype(x.dtype), x)
    h = jax.nn.gelu(jnp.einsum("ebcd,edh->ebch", rows, w_in))
    return jnp.einsum("btec,ebch,ehd->btd", combine, h, w_out), balance


def by_gathers(
    top_k: int, x: Array, router: Array, w_in: Array, w_out: Array
) -> tuple[Array, Array]:
    """Rows taken at sorted indices, and added back where they came from."""
    tokens, experts = x.shape[1], router.shape[1]
    capacity = math.ceil(1.25 * top_k * tokens / experts)
    w, chosen, balance = routed(x, router, top_k)

    def seats(chosen: Array) -> Array:
        expert = chosen.T.ravel()
        order = jnp.argsort(expert, stable=True)
        first = jnp.searchsorted(expert[order], jnp.arange(experts + 1))
        at = first[:-1, None] + jnp.arange(capacity)
        return jnp.where(at < first[1:, None], order[at], top_k * tokens)

    choice = jax.vmap(seats)(chosen)
    weight = jax.vmap(lambda w, c: w.T.ravel().at[c].get(mode="fill", fill_value=0))(w, choice)
    rows = jax.vmap(lambda x, c: x[c % tokens])(x, choice)
    h = jax.nn.gelu(jnp.einsum("becd,edh->bech", rows, w_in))
    out = jnp.einsum("bech,ehd->becd", h, w_out) * weight[..., None]
    y = jax.vmap(lambda out, c: jnp.zeros(x.shape[1:]).at[c % tokens].add(out))(out, choice)
    return y, balance


def mixture(
    theirs: str, batch: int, tokens: int, features: int, hidden: int, experts: int, top_k: int
) -> Case:
    def make() -> tuple[Array, ...]:
        return (
            normal(batch, tokens, features, seed=0),
            normal(features, experts, seed=1, scale=features**-0.5),
            normal(experts, features, hidden, seed=2, scale=features**-0.5),
            normal(experts, hidden, features, seed=3, scale=hidden**-0.5),
        )

    form = {"one-hot": by_products, "gathers": by_gathers}[theirs]
    setting = f"{batch} x {tokens} x {features}, {top_k} of {experts} x {hidden}, against {theirs}"
    return Case(
        "mixture_of_experts",
        setting,
        make,
        bh.ops.mixture_of_experts.bind(top_k=top_k, activation="gelu_tanh"),
        functools.partial(form, top_k),
    )


def cases() -> Iterator[Case]:
    for name in UNITS:
        for sizes in ((64, 256), (512, 1024), (2048, 2048)):
            yield unit(name, *sizes)
    for sizes in ((64, 64, 256), (512, 256, 1024), (4096, 256, 1024), (2048, 512, 2048)):
        yield mlp(*sizes)
        yield gated_mlp(*sizes)
    for theirs in ("one-hot", "gathers"):
        yield mixture(theirs, 8, 64, 64, 128, 4, 1)
        yield mixture(theirs, 4, 256, 256, 512, 8, 2)
        yield mixture(theirs, 1, 1024, 256, 1024, 8, 2)
        yield mixture(theirs, 4, 256, 256, 256, 32, 2)
