"""A Flax NNX transformer with three of its ops swapped for hand-written ones: the same losses.

    python examples/flax_digits.py

Reads the digits of `examples/digits.py` as 8 tokens, the rows of an image. Attention, layer
normalization and GELU are Flax's in one model and `bh.ops` in the other; parameters, optimizer and
training step are Flax's in both. About 10 seconds on two CPU cores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import backhand as bh
from common import Parser, side_by_side, write_metrics

TOKENS, WIDTH, HEADS = 8, 64, 4


class Ops(NamedTuple):
    """What is swapped."""

    attention: Callable[..., Any]
    layer_norm: Callable[[nnx.LayerNorm, Any], Any]
    gelu: Callable[[Any], Any]


FLAX = Ops(nnx.dot_product_attention, lambda norm, x: norm(x), nnx.gelu)

BACKHAND = Ops(
    bh.ops.attention,
    lambda norm, x: bh.ops.layer_norm(x, norm.scale[...], norm.bias[...], eps=norm.epsilon),
    bh.ops.gelu.bind(approximate=True),  # as nnx.gelu is
)


class Transformer(nnx.Module):
    """One block over the rows of an image, and the mean of what comes out."""

    def __init__(self, ops: Ops, rngs: nnx.Rngs):
        self.ops = ops
        self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (TOKENS, WIDTH)))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.LinearGeneral(WIDTH, (3, HEADS, WIDTH // HEADS), rngs=rngs)
        self.mix = nnx.LinearGeneral((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (B, 64) to logits (B, 10)."""
        x = self.embed(images.reshape(-1, TOKENS, 8)) + self.positions[...][None]
        q, k, v = jnp.moveaxis(self.qkv(self.ops.layer_norm(self.norm, x)), -3, 0)
        x = x + self.mix(self.ops.attention(q, k, v))
        x = x + self.down(self.ops.gelu(self.up(self.ops.layer_norm(self.norm2, x))))
        return self.out(x.mean(1))


def trainer(ops: Ops, learning_rate: float, seed: int) -> Callable[[Any], Any]:
    """A function that makes one update from a batch, and gives its loss."""
    model = Transformer(ops, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)

    def loss_of(model: Transformer, batch: Any) -> jax.Array:
        logits = model(batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    @nnx.jit
    def update(model: Transformer, optimizer: nnx.Optimizer, batch: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    return lambda batch: update(model, optimizer, batch)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, optimizers=(), steps=300, batch_size=64, learning_rate=3e-3)
    args = parser.parse(argv)
    with parser.one_line_errors():
        batches = bh.data.Batches(bh.data.digits(), args.batch_size, seed=args.seed)
        steps = {
            name: trainer(ops, args.learning_rate, args.seed)
            for name, ops in (("Flax", FLAX), ("three ops swapped", BACKHAND))
        }
        metrics = side_by_side(steps, batches, args.steps)
    write_metrics(args.json, metrics)


if __name__ == "__main__":
    main()
