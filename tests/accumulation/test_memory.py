"""What sums take beside a step without accumulation, as XLA allots it: with AdamW, K = 4."""

import jax
import jax.numpy as jnp
import optax
import pytest

import backhand as bh

BLOCK = bh.skip(bh.chain(bh.layer_norm(), bh.dense(512), bh.gelu(), bh.dense(128)))
CROSS_ENTROPY = bh.losses.softmax_cross_entropy


def classifier(*layers):
    return bh.objective(bh.chain(*layers, bh.dense(10)), CROSS_ENTROPY)


MLP = classifier(bh.dense(512), bh.relu(), bh.dense(512), bh.relu())
UNROLLED = classifier(*[BLOCK] * 4)
REPEATED = classifier(bh.repeat(BLOCK, 4))
TIED = bh.linear_cross_entropy_objective(
    bh.chain(tokens=bh.embedding(256, 128), body=bh.repeat(BLOCK, 4)), 256, tied="tokens/table"
)
CONVOLUTIONS = classifier(
    bh.conv(32, (3, 3)), bh.relu(), bh.conv(32, (3, 3)), bh.relu(), bh.global_average_pool()
)


def images(rows):
    return {"inputs": jnp.ones((rows // 16, 8, 8, 16)), "targets": jnp.zeros(rows // 16, jnp.int32)}


def vectors(rows):
    return {"inputs": jnp.ones((rows, 128)), "targets": jnp.zeros(rows, jnp.int32)}


def texts(rows):
    ids = jnp.zeros((rows // 4, 4), jnp.int32)
    return {"inputs": ids, "targets": ids}


def above(objective, make, rows, **settings):
    """What a step of 4 micro-batches takes above a step of one, in gradients."""
    optimizer = optax.adamw(1e-3)
    params = objective.init(jax.random.key(0), make(rows))
    state = bh.train_state(params, optimizer)
    one, four = (
        bh.train_step(objective, optimizer, accumulate=k, **settings)
        .jitted.lower(state, make(k * rows))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for k in (1, 4)
    )
    return (four - one) / sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("objective", "make", "rows", "nonfinite"),
    [
        (MLP, vectors, 32, "keep"),
        (MLP, vectors, 32, "drop"),
        (REPEATED, vectors, 64, "keep"),
        (REPEATED, vectors, 64, "drop"),
        (TIED, texts, 64, "keep"),
    ],
    ids=["mlp", "mlp, drop", "repeat", "repeat, drop", "tied over repeat"],
)
def test_sums_take_at_most_half_a_gradient_more(objective, make, rows, nonfinite):
    assert above(objective, make, rows, nonfinite=nonfinite) <= 0.5


@pytest.mark.parametrize(
    ("objective", "make"), [(UNROLLED, vectors), (CONVOLUTIONS, images)], ids=["blocks", "images"]
)
def test_what_never_has_its_gradient_whole_takes_its_sums_and_no_more(objective, make):
    """Without accumulation gradients are applied one by one, or make no peak beside activations.

    With it there are the sums, while the activations of a micro-batch are at their peak.
    """
    assert above(objective, make, 64) <= 1.0
