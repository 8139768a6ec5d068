"""Layers and combinators, both ways, against the same models in plain JAX under `jax.grad`.

Ours is `bh.differentiable(layer)`. "everything stored" leaves it to autodiff what is kept of a
stack of blocks, "checkpoint" is the same with `jax.checkpoint` around each block.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import backhand as bh
from benchmarks.measure import cores
from benchmarks.ops.attention import Seen, near, plain
from benchmarks.ops.case import Case, integers, normal, sized
from benchmarks.ops.peer import Prepare, of_trees, one, tensor
from benchmarks.ops.recurrent import CELLS, RECURRENCES, fill, hoisted, lstm_cell

Forward = Callable[[Any, Array], Array]


def case(
    name: str,
    setting: str,
    layer: bh.Layer,
    theirs: Forward,
    x: Callable[[], Any],
    torch: Any = None,
    dtype: str = "float32",
) -> Case:
    """A layer's parameters, as they begin, and x."""

    def make() -> tuple[Any, Any]:
        given = x()
        return jax.jit(layer.init)(jax.random.key(0), given), given

    return Case(name, setting, make, bh.differentiable(layer), theirs, torch or {}, dtype)


def layer_norm(own: Any, x: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = jnp.mean(wide, -1, keepdims=True), jnp.var(wide, -1, keepdims=True)
    return ((wide - mean) * lax.rsqrt(var + 1e-5) * own["scale"] + own["offset"]).astype(x.dtype)


def dense(own: Any, x: Array) -> Array:
    return x @ own["w"].astype(x.dtype) + own["b"].astype(x.dtype)


def feed(own: Any, x: Array) -> Array:
    """Layer norm and an MLP."""
    norm, mlp = own
    h = jax.nn.gelu(dense(mlp["hidden"], layer_norm(norm, x)), approximate=False)
    return dense(mlp["out"], h)


def feed_layer(hidden: int) -> bh.Layer:
    return bh.chain(bh.layer_norm(), bh.mlp(hidden))


def attend(own: Any, x: Array, context: Array, heads: int, seen: Seen) -> Array:
    """Multi-head attention of x to a context."""

    def split(name: str, x: Array) -> Array:
        return (x @ own[name]["w"]).reshape(*x.shape[:2], heads, -1)

    y = plain(split("query", x), split("key", context), split("value", context), seen=seen)
    return y.reshape(x.shape) @ own["out"]["w"]


def attend_in_torch(
    functional: Any, own: Any, x: Any, context: Any, heads: int, causal: bool
) -> Any:
    def split(name: str, x: Any) -> Any:
        return (x @ own[name]["w"]).view(*x.shape[:2], heads, -1).transpose(1, 2)

    q, k, v = split("query", x), split("key", context), split("value", context)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).reshape(x.shape) @ own["out"]["w"]


def multi_head_attention(batch: int, tokens: int, features: int, heads: int) -> Case:
    def theirs(params: Any, x: Array) -> Array:
        return attend(params, x, x, heads, near(tokens, tokens))

    def torch(functional: Any, params: Any, x: Any) -> Any:
        return attend_in_torch(functional, params, x, x, heads, causal=True)

    return case(
        "multi_head_attention",
        f"causal, {sized(batch, tokens, features)}, {heads} heads",
        bh.multi_head_attention(heads, causal=True),
        theirs,
        lambda: normal(batch, tokens, features),
        of_trees(torch),
    )


def bidirectional(steps: int, batch: int, units: int) -> Case:
    def theirs(params: Any, x: Array) -> Array:
        def run(name: str, reverse: bool) -> Array:
            own = params[name]
            return hoisted(lstm_cell, 2, reverse=reverse)(x, own["wx"], own["wh"], own["b"])

        return jnp.concatenate([run("ahead", False), run("back", True)], -1)

    return case(
        "bidirectional",
        f"lstm, T{steps} B{batch} D=H={units}",
        bh.bidirectional(bh.lstm, units),
        theirs,
        lambda: normal(batch, steps, units),
        recurrent_module("lstm", units, bidirectional=True),
    )


def stacked(name: str, layers: int, steps: int, batch: int, units: int) -> Case:
    """Recurrent layers one on another."""
    cell, states, _ = CELLS[name]

    def theirs(params: Any, x: Array) -> Array:
        for own in params:
            inner = (own["bn"],) if "bn" in own else ()
            x = hoisted(cell, states)(x, own["wx"], own["wh"], own["b"], *inner)
        return x

    return case(
        "stacked",
        f"{layers} layers of {name}, T{steps} B{batch} D=H={units}",
        bh.stacked(getattr(bh, name), units, layers),
        theirs,
        lambda: normal(batch, steps, units),
        recurrent_module(name, units, num_layers=layers),
    )


def recurrent_module(name: str, units: int, **settings: Any) -> dict[str, Prepare]:
    """PyTorch's module of several recurrent layers, with the same weights."""

    def prepare(dy: Any, params: Any, x: Any) -> Callable[[], Any]:
        import torch

        torch.set_num_threads(cores())
        module = getattr(torch.nn, name.upper())(units, units, batch_first=True, **settings)
        parameters = list(module.parameters())
        layers = params.values() if isinstance(params, dict) else params
        for index, own in enumerate(layers):
            weights = (own["wx"], own["wh"], own["b"], own.get("bn"))
            fill(parameters[4 * index : 4 * index + 4], weights)
        given, error = tensor(x).requires_grad_(), tensor(dy)

        def run() -> Any:
            y, _ = module(given)
            return y, torch.autograd.grad(y, [given, *parameters], error)

        return run

    return {"": prepare}


def positional_embedding(length: int, batch: int, tokens: int, features: int) -> Case:
    """A table of `length` learned vectors, of which the first `tokens` are read."""
    return case(
        "positional_embedding",
        f"{sized(batch, tokens, features)} of {length}",
        bh.positional_embedding(length),
        lambda params, x: x + params["table"][:tokens],
        lambda: normal(batch, tokens, features),
        of_trees(lambda functional, params, x: x + params["table"][:tokens]),
    )


def diagonal_ssm(against: str, batch: int, steps: int, features: int, states: int) -> Case:
    def theirs(params: Any, x: Array) -> Array:
        a = jax.nn.sigmoid(params["decay"])
        u = jnp.sqrt(1 - a**2) * (x @ params["w_in"])
        h = RECURRENCES[against](jnp.broadcast_to(a, u.shape), u)
        return h @ params["w_out"] + x * params["skip"]

    return case(
        "diagonal_ssm",
        f"B{batch} T{steps} D{features}, {states} states, against {against}",
        bh.diagonal_ssm(states),
        theirs,
        lambda: normal(batch, steps, features),
    )


def repeat(against: str, depth: int, rows: int, features: int) -> Case:
    """A stack of x + mlp(layer_norm(x))."""
    block = bh.skip(feed_layer(4 * features))
    if against == "checkpoint":
        block = bh.checkpoint(block)

    def theirs(params: Any, x: Array) -> Array:
        def step(x: Array, own: Any) -> tuple[Array, None]:
            return x + feed(own, x), None

        step = jax.checkpoint(step) if against == "checkpoint" else step
        return lax.scan(step, x, params)[0]

    setting = f"depth {depth}, {rows} x {features} x {4 * features}, against {against}"
    return case("repeat", setting, bh.repeat(block, depth), theirs, lambda: normal(rows, features))


def share(rows: int, words: int, features: int) -> Case:
    """One table for the words that come in and those that come out."""
    model = bh.chain(
        tokens=bh.embedding(words, features),
        block=bh.skip(feed_layer(4 * features)),
        logits=bh.unembedding(words),
    )

    def theirs(params: Any, ids: Array) -> Array:
        table = params["tokens"]["table"]
        x = jnp.take(table, ids, axis=0)
        return (x + feed(params["block"], x)) @ table.T

    def torch(functional: Any, *leaves: Any) -> Any:
        offset, scale, b1, w1, b2, w2, table, ids = leaves
        x = functional.embedding(ids, table)
        h = functional.layer_norm(x, x.shape[-1:], scale, offset)
        return (x + functional.gelu(h @ w1 + b1) @ w2 + b2) @ table.T

    return case(
        "share",
        f"tied table, {rows} of {words} x {features}",
        bh.share(model, {"logits/table": "tokens/table"}),
        theirs,
        lambda: integers(0, words, rows),
        one(torch),
    )


def reversible(against: str, depth: int, rows: int, features: int, dtype: str = "float32") -> Case:
    block = feed_layer(2 * features)

    def theirs(params: Any, x: Array) -> Array:
        def step(halves: tuple[Array, Array], own: Any) -> tuple[tuple[Array, Array], None]:
            x1, x2 = halves
            y1 = x1 + feed(own["f"], x2)
            return (y1, x2 + feed(own["g"], y1)), None

        step = jax.checkpoint(step) if against == "checkpoint" else step
        halves, _ = lax.scan(step, tuple(jnp.split(x, 2, -1)), params)
        return jnp.concatenate(halves, -1)

    return case(
        "reversible",
        f"depth {depth}, {rows} x {features}, against {against}",
        bh.reversible(block, block, depth),
        theirs,
        lambda: normal(rows, features, dtype=dtype),
        dtype=dtype,
    )


def cases() -> Iterator[Case]:
    for sizes in ((4, 256, 512, 8), (1, 1024, 512, 8)):
        yield multi_head_attention(*sizes)
    yield bidirectional(100, 32, 256)
    yield stacked("lstm", 2, 100, 32, 256)
    yield stacked("gru", 3, 50, 32, 256)
    for against in RECURRENCES:
        yield diagonal_ssm(against, 8, 512, 256, 256)
    for against in ("everything stored", "checkpoint"):
        yield repeat(against, 8, 1024, 256)
        for depth in (4, 16):
            yield reversible(against, depth, 1024, 128)
        yield reversible(against, 16, 1024, 128, "bfloat16")
    yield share(512, 8192, 256)
    yield positional_embedding(128, 8, 64, 64)
    yield positional_embedding(1024, 8, 512, 512)
