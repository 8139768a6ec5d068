"""In float64 the hand-written pass of every row is that of its reference, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backhand.catalogue import ROWS
from tests.conformance.checks import (
    FIRST,
    NAMES,
    automatic,
    by_path,
    call,
    differences,
    faults,
    floating,
    hand_written,
    length,
    magnitude,
    mismatches,
    problem,
    random_like,
    unlike,
)
from tests.tolerances import tolerance

pytestmark = pytest.mark.usefixtures("x64")

EDGES = [(row, edge) for row in FIRST for edge in row.edges if 0 not in edge.values()]
EMPTY = [(row, edge) for row in ROWS for edge in row.edges if 0 in edge.values()]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_every_leaf_of_every_cotangent_is_that_of_the_reference(row):
    assert faults(row) == []


@pytest.mark.oldest_only
@pytest.mark.parametrize(("row", "edge"), EDGES, ids=repr)
def test_one_example_and_one_feature_are_no_exception(row, edge):
    arguments, dy = problem(row, **edge)

    @jax.jit
    def run(arguments, dy):
        ours = row.forward(*arguments)[0], hand_written(row, arguments, dy)
        return ours, (row.reference(*arguments), automatic(row.reference, arguments, dy))

    assert unlike(*run(arguments, dy), arguments, dy) == []


@pytest.mark.oldest_only
@pytest.mark.parametrize(("row", "edge"), EMPTY, ids=repr)
def test_an_empty_batch_gives_no_blame_to_any_parameter(row, edge):
    arguments, dy = problem(row, **edge)
    cotangents = jax.jit(lambda *given: hand_written(row, *given))(arguments, dy)
    primals, _ = floating(arguments)
    assert mismatches(cotangents, primals) == []
    assert not any(np.asarray(leaf).any() for leaf in cotangents.values())


@pytest.mark.oldest_only
@pytest.mark.parametrize("row", FIRST, ids=repr)
def test_jax_grad_of_the_call_runs_the_hand_written_backward(row):
    """And the gradient of that gradient is the reference's: rules are differentiable themselves."""
    arguments, dy = problem(row)
    weights = random_like(jax.eval_shape(lambda: floating(arguments)[0]), seed=1)

    def both_orders(function, arguments, dy):
        def blame(arguments, dy):
            return automatic(function, arguments, dy)

        first = blame(arguments, dy)
        leaves, rebuild = floating(arguments)
        _, back = jax.vjp(lambda leaves, dy: blame(rebuild(leaves), dy), leaves, dy)
        return first, back(weights)

    @jax.jit
    def run(arguments, dy):
        ours = both_orders(call(row), arguments, dy)
        return ours, both_orders(row.reference, arguments, dy)

    (first, second), (expected, curvature) = run(arguments, dy)
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected))
    assert differences(first, expected, limit) == []
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected, curvature))
    for ours, truth in zip(second, curvature, strict=True):
        assert differences(by_path(ours), by_path(truth), limit) == []
