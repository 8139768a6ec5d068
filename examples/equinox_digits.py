"""An Equinox LSTM with three of its ops swapped for hand-written ones: the same losses.

    python examples/equinox_digits.py

Reads the digits of `examples/digits.py` row by row, 8 steps of 8 pixels. The LSTM over all steps,
layer normalization and the cross-entropy are Equinox's and Optax's in one model, `bh.ops` and
`bh.losses` in the other; parameters and training step are Equinox's in both. About 10 seconds on
two CPU cores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import backhand as bh
from common import Parser, side_by_side, write_metrics

STEPS, WIDTH = 8, 64


class Ops(NamedTuple):
    """What is swapped; each takes a batch."""

    lstm: Callable[[eqx.nn.LSTMCell, Any], Any]
    layer_norm: Callable[[eqx.nn.LayerNorm, Any], Any]
    cross_entropy: Callable[[Any, Any], Any]


def scanned(cell: eqx.nn.LSTMCell, x: jax.Array) -> jax.Array:
    """The state after the last step, (B, H), as Equinox's documentation writes it."""

    def last(sequence: jax.Array) -> jax.Array:
        start = (jnp.zeros(WIDTH), jnp.zeros(WIDTH))
        return jax.lax.scan(lambda state, x: (cell(x, state), None), start, sequence)[0][0]

    return jax.vmap(last)(x)


def by_hand(cell: eqx.nn.LSTMCell, x: jax.Array) -> jax.Array:
    _, (h, _) = bh.ops.lstm(x, cell.weight_ih.T, cell.weight_hh.T, cell.bias)
    return h


def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    total, weight = bh.losses.softmax_cross_entropy(logits, labels)
    return total / weight


EQUINOX = Ops(
    scanned,
    lambda norm, x: jax.vmap(norm)(x),
    lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
)

BACKHAND = Ops(
    by_hand,
    lambda norm, x: bh.ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps),
    mean_loss,
)


class Reader(eqx.Module):
    """An LSTM over the rows of an image, then a normalized linear layer."""

    cell: eqx.nn.LSTMCell
    norm: eqx.nn.LayerNorm
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(8, WIDTH, key=keys[0])
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.out = eqx.nn.Linear(WIDTH, 10, key=keys[1])

    def __call__(self, images: jax.Array, ops: Ops) -> jax.Array:
        """Images (B, 64) to logits (B, 10)."""
        h = ops.lstm(self.cell, images.reshape(-1, STEPS, 8))
        return jax.vmap(self.out)(ops.layer_norm(self.norm, h))


def trainer(ops: Ops, learning_rate: float, seed: int) -> Callable[[Any], Any]:
    """A function that makes one update from a batch, and gives its loss."""
    model = Reader(jax.random.key(seed))
    optimizer = optax.adamw(learning_rate)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def update(model: Reader, state: Any, batch: Any) -> tuple[Reader, Any, jax.Array]:
        def loss_of(model: Reader) -> jax.Array:
            return ops.cross_entropy(model(batch["inputs"], ops), batch["targets"])

        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    def step(batch: Any) -> jax.Array:
        nonlocal model, state
        model, state, loss = update(model, state, batch)
        return loss

    return step


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, optimizers=(), steps=300, batch_size=64, learning_rate=3e-3)
    args = parser.parse(argv)
    with parser.one_line_errors():
        batches = bh.data.Batches(bh.data.digits(), args.batch_size, seed=args.seed)
        steps = {
            name: trainer(ops, args.learning_rate, args.seed)
            for name, ops in (("Equinox", EQUINOX), ("three ops swapped", BACKHAND))
        }
        metrics = side_by_side(steps, batches, args.steps)
    write_metrics(args.json, metrics)


if __name__ == "__main__":
    main()
