"""Losses, both ways, against what one would write with `jax.nn` and Optax."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import backhand as bh
from benchmarks.ops.case import Case, integers, normal, summed
from benchmarks.ops.peer import one

SHAPES = ((64, 64), (4096, 512))
CLASSES = ((64, 10), (512, 1000), (4096, 1000))

# Losses of numbers and classes --------------------------------------------------------------------


def kl_divergence(x: Array, t: Array) -> Array:
    return optax.losses.kl_divergence(jax.nn.log_softmax(x), t)


def softmax_focal(x: Array, ids: Array) -> Array:
    log_p = jnp.take_along_axis(jax.nn.log_softmax(x), ids[:, None], -1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def hinge(x: Array, bits: Array) -> Array:
    return optax.losses.hinge_loss(x, 2 * bits.astype(x.dtype) - 1)


def sigmoid_focal(x: Array, bits: Array) -> Array:
    return optax.losses.sigmoid_focal_loss(x, bits.astype(x.dtype), gamma=2.0)


def sigmoid_cross_entropy(x: Array, bits: Array) -> Array:
    return optax.losses.sigmoid_binary_cross_entropy(x, bits.astype(x.dtype))


def dice(x: Array, bits: Array) -> Array:
    p, t = jax.nn.sigmoid(x), bits.astype(x.dtype)
    both = 2 * jnp.sum(p * t, (1, 2)) + 1
    return 1 - both / (jnp.sum(p, (1, 2)) + jnp.sum(t, (1, 2)) + 1)


def cosine_distance(x: Array, t: Array) -> Array:
    return optax.losses.cosine_distance(x, t, epsilon=1e-6)


def similarity(q: Array, k: Array) -> Array:
    u, v = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True)) for x in (q, k))
    return u @ v.T / 0.07


def info_nce(q: Array, k: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(similarity(q, k), jnp.arange(len(q)))


def info_nce_both_ways(q: Array, k: Array) -> Array:
    z, labels = similarity(q, k), jnp.arange(len(q))
    each = optax.softmax_cross_entropy_with_integer_labels
    return (each(z, labels) + each(z.T, labels)) / 2


def softmax_cross_entropy(x: Array, ids: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(wide, ids)


TORCH: dict[str, Callable[..., Any]] = {
    "softmax_cross_entropy": lambda f, x, ids: f.cross_entropy(x, ids, reduction="sum"),
    "mean_squared_error": lambda f, x, t: f.mse_loss(x, t, reduction="sum"),
    "mean_absolute_error": lambda f, x, t: f.l1_loss(x, t, reduction="sum"),
    "huber": lambda f, x, t: f.huber_loss(x, t, reduction="sum"),
    "kl_divergence": lambda f, x, t: f.kl_div(f.log_softmax(x, -1), t, reduction="sum"),
    "triplet": lambda f, a, p, n: f.triplet_margin_loss(a, p, n, reduction="sum"),
    "sigmoid_cross_entropy": lambda f, x, bits: f.binary_cross_entropy_with_logits(
        x, bits, reduction="sum"
    ),
}


def case(
    name: str,
    theirs: Callable[..., Array],
    make: Callable[[], tuple[Array, ...]],
    shape: tuple[int, ...],
    dtype: str = "float32",
) -> Case:
    torch = one(TORCH[name]) if name in TORCH else {}
    setting = " x ".join(map(str, shape))
    return Case(name, setting, make, getattr(bh.losses, name), summed(theirs), torch, dtype)


def of_classes(name: str, theirs: Any, rows: int, classes: int, dtype: str = "float32") -> Case:
    def make() -> tuple[Array, Array]:
        return normal(rows, classes, dtype=dtype), integers(0, classes, rows)

    return case(name, theirs, make, (rows, classes), dtype)


def of_numbers(name: str, theirs: Any, count: int, *shape: int) -> Case:
    """Of as many arrays of one shape."""
    return case(name, theirs, lambda: tuple(normal(*shape, seed=i) for i in range(count)), shape)


def triplet(*shape: int) -> Case:
    whole = of_numbers("triplet", optax.losses.triplet_margin_loss, 3, *shape)
    return dataclasses.replace(whole, ours=lambda *three: bh.losses.triplet(three))


def paired(*shape: int) -> Case:
    loss = bh.losses.paired(bh.losses.info_nce.bind(symmetric=True))
    whole = of_numbers("paired", info_nce_both_ways, 2, *shape)
    setting = f"info_nce both ways, {whole.setting}"
    return dataclasses.replace(whole, ours=lambda *both: loss(both), setting=setting)


def of_bits(name: str, theirs: Any, *shape: int, dtype: str = "int32") -> Case:
    def make() -> tuple[Array, Array]:
        return normal(*shape), integers(0, 2, *shape).astype(dtype)

    return case(name, theirs, make, shape)


def of_shares(rows: int, classes: int) -> Case:
    def make() -> tuple[Array, Array]:
        shares = np.random.default_rng(1).dirichlet(np.ones(classes), rows)
        return normal(rows, classes), jnp.asarray(shares, jnp.float32)

    return case("kl_divergence", kl_divergence, make, (rows, classes))


def with_balance(batch: int, tokens: int, words: int) -> Case:
    """Cross-entropy and the balance of a mixture of experts."""
    loss = bh.losses.with_balance(bh.losses.softmax_cross_entropy, 0.01)

    def make() -> tuple[Any, ...]:
        predictions = normal(batch, tokens, words), normal(batch, seed=1)
        return predictions, integers(0, words, batch, tokens)

    def theirs(predictions: tuple[Array, Array], labels: Array) -> Any:
        logits, balance = predictions
        total, count = summed(optax.softmax_cross_entropy_with_integer_labels)(logits, labels)
        more, examples = 0.01 * jnp.sum(balance), jnp.asarray(batch, balance.dtype)
        return {"loss": total, "balance": more}, {"loss": count, "balance": examples}

    return Case("with_balance", f"{batch} x {tokens} x {words}", make, loss, theirs)


# CTC ----------------------------------------------------------------------------------------------

# Examples, frames, symbols, labels: characters, phonemes, word pieces.
SPEECH = ((2, 50, 28, 10), (16, 200, 32, 40), (8, 1000, 64, 150), (16, 300, 1024, 60))


def ctc(examples: int, frames: int, symbols: int, most: int) -> Case:
    def make() -> tuple[Array, ...]:
        logits, labels = normal(examples, frames, symbols), integers(1, symbols, examples, most)
        heard = integers(3 * frames // 4, frames + 1, examples, seed=2)
        return logits, labels, integers(most // 2, most + 1, examples, seed=1), heard

    def ours(logits: Array, labels: Array, lengths: Array, heard: Array) -> Any:
        known = {"labels": labels, "label_lengths": lengths, "input_lengths": heard}
        return bh.losses.ctc(logits, known)

    def theirs(logits: Array, labels: Array, lengths: Array, heard: Array) -> Array:
        frames = (jnp.arange(logits.shape[1]) >= heard[:, None]).astype(logits.dtype)
        places = (jnp.arange(labels.shape[1]) >= lengths[:, None]).astype(logits.dtype)
        return optax.ctc_loss(logits, frames, labels, places)

    def torch(functional: Any, logits: Any, labels: Any, lengths: Any, heard: Any) -> Any:
        log_p = functional.log_softmax(logits, -1).transpose(0, 1)
        return functional.ctc_loss(log_p, labels, heard, lengths, reduction="sum")

    setting = f"{examples} x {frames} x {symbols}, {most} labels"
    return Case("ctc", setting, make, ours, summed(theirs), one(torch))


def cases() -> Iterator[Case]:
    for sizes in ((64, 10), (1024, 1000), (4096, 8192)):
        yield of_classes("softmax_cross_entropy", softmax_cross_entropy, *sizes)
    yield of_classes("softmax_cross_entropy", softmax_cross_entropy, 1024, 8192, "bfloat16")
    for shape in SHAPES:
        yield of_numbers("mean_squared_error", optax.losses.squared_error, 2, *shape)
        yield of_numbers("mean_absolute_error", lambda x, t: jnp.abs(x - t), 2, *shape)
        yield of_numbers("huber", optax.losses.huber_loss, 2, *shape)
        yield of_bits("sigmoid_cross_entropy", sigmoid_cross_entropy, *shape, dtype="float32")
    for speech in SPEECH:
        yield ctc(*speech)
    for sizes in CLASSES:
        yield of_shares(*sizes)
        yield of_classes("multiclass_hinge", optax.losses.multiclass_hinge_loss, *sizes)
        yield of_classes("softmax_focal", softmax_focal, *sizes)
    for shape in ((64, 10), (8, 128, 128, 4)):
        yield of_bits("hinge", hinge, *shape)
        yield of_bits("sigmoid_focal", sigmoid_focal, *shape)
    yield of_bits("dice", dice, 8, 128, 128, 4)
    for shape in ((32, 64), (1024, 256)):
        yield of_numbers("cosine_distance", cosine_distance, 2, *shape)
        yield triplet(*shape)
        yield of_numbers("info_nce", info_nce, 2, *shape)
        yield paired(*shape)
    for sizes in ((8, 16, 100), (8, 128, 1000)):
        yield with_balance(*sizes)
