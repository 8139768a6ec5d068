"""Every row under JAX's transformations gives what it gives one call at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import backhand as bh
from backhand.catalogue import ROWS
from tests.conformance.checks import (
    FIRST,
    arguments_of,
    automatic,
    call,
    differences,
    hand_written,
    length,
    magnitude,
    problem,
    truth,
)
from tests.tolerances import tolerance

pytestmark = [pytest.mark.oldest_only, pytest.mark.usefixtures("x64")]


def keeps_shape(row):
    """Whether the row is a layer whose output can be its input again."""
    if not isinstance(row.function, bh.Layer):
        return False
    arguments = arguments_of(row)
    y = jax.eval_shape(row.reference, *arguments)
    return y == bh.protocol.shapes_of(arguments[1])


REPEATABLE = [row for row in FIRST if keeps_shape(row)]


@pytest.mark.parametrize("row", FIRST, ids=repr)
def test_vmap_and_scan_give_what_one_call_after_the_other_gives(row):
    """The call inside a scan or vmap is differentiated: residuals are stacked on the way."""
    one, other = problem(row, seed=0), problem(row, seed=1)
    arguments, dy = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    function = call(row)

    def scanned(*arguments):
        return lax.scan(lambda carry, own: (carry, function(*own)), None, arguments)[1]

    @jax.jit
    def run(arguments, dy):
        return [automatic(f, arguments, dy) for f in (jax.vmap(function), scanned)]

    single = truth(row)
    singly = (single(*given)[1] for given in (one, other))
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singly)
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected))
    for name, got in zip(("vmap", "scan"), run(arguments, dy), strict=True):
        assert (name, differences(got, expected, limit)) == (name, [])


@pytest.mark.parametrize("row", REPEATABLE, ids=repr)
def test_a_repeated_layer_has_the_gradient_of_its_scan_remembered_or_recomputed(row):
    remembered, recomputed = (
        dataclasses.replace(
            row, subject=bh.repeat, settings={"inner": inner, "depth": 2}, textbook=None
        )
        for inner in (row.function, bh.checkpoint(row.function))
    )
    arguments, dy = problem(remembered)

    @jax.jit
    def run(arguments, dy):
        expected = automatic(remembered.reference, arguments, dy)
        return expected, [hand_written(row, arguments, dy) for row in (remembered, recomputed)]

    expected, (ours, again) = run(arguments, dy)
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected))
    assert differences(ours, expected, limit) == []
    assert differences(again, expected, limit) == []


@pytest.mark.parametrize("row", [row for row in ROWS if "key" in row.side], ids=repr)
def test_another_key_gives_other_numbers_and_the_same_key_the_same(row):
    """Forward and backward draw the same: else a cotangent would be of another function."""
    (params, x, side), dy = problem(row)
    run = jax.jit(lambda key: hand_written(row, (params, x, {**side, "key": key}), dy))
    same, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert differences(same, again, 0.0) == []
    assert differences(same, other, 0.0) != []
