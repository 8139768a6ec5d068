"""Blocks of an encoder and a decoder, alone and repeated over one context that all of them read.

The other side closes its `lax.scan` over the context, as an expert would, so that it is there once.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax import Array, lax

import backhand as bh
from benchmarks.ops.attention import near
from benchmarks.ops.case import Case, normal
from benchmarks.ops.layers import attend, attend_in_torch, case, feed, feed_layer, layer_norm
from benchmarks.ops.peer import of_trees


class Parts(NamedTuple):
    """What blocks are made of, in JAX or PyTorch; `attend` takes (params, x, context, causal)."""

    norm: Callable[..., Any]
    feed: Callable[..., Any]
    attend: Callable[..., Any]


class Sizes(NamedTuple):
    batch: int
    tokens: int
    places: int
    features: int
    heads: int

    def make(self) -> dict[str, Array]:
        """A decoder's x and the context that an encoder starts from."""
        shapes = {"x": (self.tokens, 0), "context": (self.places, 1)}
        return {
            name: normal(self.batch, length, self.features, seed=seed)
            for name, (length, seed) in shapes.items()
        }

    def __str__(self) -> str:
        lengths = f"{self.batch}x{self.tokens}/{self.places}x{self.features}"
        return f"{lengths}, {self.heads} heads"


def encoder_layer(heads: int, features: int) -> bh.Layer:
    return bh.chain(
        bh.skip(bh.chain(bh.layer_norm(), bh.multi_head_attention(heads))),
        bh.skip(feed_layer(4 * features)),
    )


def decoder_layer(heads: int, features: int) -> bh.Layer:
    own = bh.chain(bh.layer_norm(), bh.multi_head_attention(heads, causal=True))
    cross = bh.chain(bh.on("x", bh.layer_norm()), bh.multi_head_attention(heads))
    return bh.chain(
        bh.on("x", bh.skip(own)),
        bh.skip(cross, on="x"),
        bh.on("x", bh.skip(feed_layer(4 * features))),
    )


def encode(of: Parts, params: Any, x: Any) -> Any:
    (norm, attention), mlp = params
    h = of.norm(norm, x)
    x = x + of.attend(attention, h, h, False)
    return x + of.feed(mlp, x)


def decode(of: Parts, params: Any, x: Any, context: Any) -> Any:
    (own_norm, own), (cross_norm, cross), mlp = params
    h = of.norm(own_norm, x)
    x = x + of.attend(own, h, h, True)
    x = x + of.attend(cross, of.norm(cross_norm, x), context, False)
    return x + of.feed(mlp, x)


def in_jax(heads: int) -> Parts:
    def attention(own: Any, x: Array, context: Array, causal: bool) -> Array:
        seen = near(x.shape[1], context.shape[1]) if causal else None
        return attend(own, x, context, heads, seen)

    return Parts(layer_norm, feed, attention)


def in_torch(functional: Any, heads: int) -> Parts:
    def norm(own: Any, x: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], own["scale"], own["offset"])

    def dense(own: Any, x: Any) -> Any:
        return functional.linear(x, own["w"].T, own["b"])

    def feed(own: Any, x: Any) -> Any:
        h = functional.gelu(dense(own[1]["hidden"], norm(own[0], x)))
        return dense(own[1]["out"], h)

    def attention(own: Any, x: Any, context: Any, causal: bool) -> Any:
        return attend_in_torch(functional, own, x, context, heads, causal)

    return Parts(norm, feed, attention)


def blocks(sizes: Sizes) -> Case:
    """One block of an encoder, and one of a decoder that reads what it gives."""
    heads, features = sizes.heads, sizes.features
    model = bh.chain(
        encoder=bh.on("context", encoder_layer(heads, features)),
        decoder=decoder_layer(heads, features),
        out=bh.pick("x"),
    )

    def run(of: Parts, params: Any, x: Any) -> Any:
        context = encode(of, params["encoder"], x["context"])
        return decode(of, params["decoder"], x["x"], context)

    return case(
        "chain",
        f"encoder block and decoder block, {sizes}",
        model,
        lambda params, x: run(in_jax(heads), params, x),
        sizes.make,
        of_trees(lambda functional, params, x: run(in_torch(functional, heads), params, x)),
    )


def repeat(against: str, depth: int, sizes: Sizes) -> Case:
    """Decoder blocks that all read one context."""
    block = decoder_layer(sizes.heads, sizes.features)
    if against == "checkpoint":
        block = bh.checkpoint(block)

    def theirs(params: Any, x: dict[str, Array]) -> Array:
        def step(y: Array, own: Any) -> tuple[Array, None]:
            return decode(in_jax(sizes.heads), own, y, x["context"]), None

        step = jax.checkpoint(step) if against == "checkpoint" else step
        return lax.scan(step, x["x"], params[0])[0]

    def torch(functional: Any, params: Any, x: Any) -> Any:
        y, of = x["x"], in_torch(functional, sizes.heads)
        leaves, structure = jax.tree.flatten(params[0])
        for own in zip(*(leaf.unbind(0) for leaf in leaves), strict=True):
            y = decode(of, structure.unflatten(own), y, x["context"])
        return y

    return case(
        "repeat",
        f"depth {depth}, decoder blocks of one context, {sizes}, against {against}",
        bh.chain(bh.repeat(block, depth), bh.pick("x")),
        theirs,
        sizes.make,
        of_trees(torch) if against == "everything stored" else None,
    )


def cases() -> Iterator[Case]:
    yield blocks(Sizes(4, 128, 256, 256, 4))
    for against in ("everything stored", "checkpoint"):
        yield repeat(against, 6, Sizes(4, 64, 128, 256, 4))
