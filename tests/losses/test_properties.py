"""Every loss over drawn shapes, weights and values: each cotangent is its reference's, to rounding.

A family is one program for each shape, so that two hundred cases compile a handful of them.
"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, note, settings

import backhand as bh
from tests.conformance.checks import both_sides
from tests.support import assert_close

L = bh.losses
SHAPES = {"examples": [4], "alone": [1], "positions": [2, 3], "mask": [2, 3]}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def numbers(rng, coarse, *shape):
    """Normal numbers; coarse ones are full of zeros and ties."""
    x = rng.standard_normal(shape)
    return np.round(x) if coarse else 2 * x


def regression(rng, coarse, positions, w):
    pair = numbers(rng, coarse, *positions), numbers(rng, coarse, *positions)
    ops = (L.mean_squared_error, L.mean_absolute_error, L.huber, L.huber.bind(delta=0.5))
    return [(op, (*pair, w)) for op in ops]


def classes(rng, coarse, positions, w):
    x = numbers(rng, coarse, *positions, 5)
    labels = rng.integers(0, 5, positions)
    shares = rng.dirichlet(np.ones(5), positions)
    return [
        (L.softmax_cross_entropy, (x, labels, w)),
        (L.softmax_cross_entropy.bind(label_smoothing=0.2), (x, labels, w)),
        (L.softmax_cross_entropy.bind(label_smoothing=0.2), (x, shares, w)),
        (L.softmax_focal, (x, labels, w)),
        (L.softmax_focal.bind(gamma=1.5), (x, shares, w)),
        (L.multiclass_hinge, (x, labels, w)),
    ]


def questions(rng, coarse, positions, w):
    x = numbers(rng, coarse, *positions)
    bits, shares = rng.integers(0, 2, positions), rng.uniform(0, 1, positions)
    return [
        (L.sigmoid_cross_entropy, (x, bits, w)),
        (L.sigmoid_cross_entropy.bind(label_smoothing=0.2), (x, shares, w)),
        (L.sigmoid_focal.bind(alpha=0.25), (x, bits, w)),
        (L.sigmoid_focal.bind(gamma=1.5, alpha=0.25), (x, shares, w)),
        (L.hinge, (x, bits, w)),
        (L.hinge.bind(margin=0.5), (x, shares, w)),
    ]


def regions(rng, coarse, positions, w):
    """Losses of examples: weights are theirs."""
    shape = [*positions[:1], 6, *positions[1:], 2]
    x, bits, shares = (
        numbers(rng, coarse, *shape),
        rng.integers(0, 2, shape),
        rng.uniform(size=shape),
    )
    if w is not None and w.ndim > 1:
        w = w[:, :2]
    return [(L.dice, (x, bits, w)), (L.dice.bind(smooth=0.5), (x, shares, w))]


def divergence(rng, coarse, positions, w):
    x, shares = numbers(rng, coarse, *positions, 5), rng.dirichlet(np.ones(5), positions)
    logs = np.where(rng.uniform(size=shares.shape) < 0.2, -np.inf, np.log(shares))
    return [
        (L.kl_divergence, (x, shares, w)),
        (L.kl_divergence.bind(log_targets=True), (x, logs, w)),
    ]


def vectors(rng, coarse, positions, w):
    # Of no length rounding would be divided by EPS.
    a, p, n = (numbers(rng, coarse, *positions, 4) + coarse / 2 for _ in range(3))
    by_example = w if w is None or w.ndim == 1 else w[:, 0]
    q, k = a.reshape(positions[0], -1), p.reshape(positions[0], -1)
    return [
        (L.cosine_distance, (a, p, w)),
        (L.triplet, ((a, p, n), None, w)),
        (L.triplet.bind(margin=3.0), (np.stack([a, p, n], 1), None, w)),
        (L.info_nce.bind(temperature=0.5), (q, k, by_example)),
        (L.info_nce.bind(temperature=0.5, symmetric=True), (q, k, by_example)),
    ]


FAMILIES = (regression, classes, questions, regions, divergence, vectors)


@functools.cache
def compiled(family):
    """`(arguments of each, dy) -> both sides of each`, compiled for each shape."""
    ops = [op for op, _ in family(np.random.default_rng(0), False, [2, 3], None)]

    def run(each, dy):
        return [both_sides(op, own, dy) for op, own in zip(ops, each, strict=True)]

    return jax.jit(run, compiler_options=QUICKLY)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.booleans(),
    st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=6, max_size=6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_values_and_errors_are_the_references(family, kind, coarse, drawn, seed):
    rng, positions = np.random.default_rng(seed), SHAPES[kind]
    with jax.enable_x64(True):
        w = np.asarray(drawn[: np.prod(positions)]).reshape(positions)
        w = {"alone": None, "mask": w > 0}.get(kind, w)
        cases = family(rng, coarse, positions, w)
        each = [arguments for _, arguments in cases]
        dy = tuple(jnp.asarray(rng.standard_normal()) for _ in range(2))
        for (op, _), (ours, truth) in zip(cases, compiled(family)(each, dy), strict=True):
            note(op.name)
            assert_close(ours, truth, floor=1e-13)
