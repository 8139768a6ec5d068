"""In low precision each side is set against float64, never one against the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backhand.arrays import is_floating
from backhand.catalogue import ROWS
from backhand.contributions import Many, Outer, Rows, Total, total
from tests.conformance.checks import (
    DISTINCT,
    FIRST,
    NAMES,
    arguments_of,
    automatic,
    distance,
    floating,
    hand_written,
    length,
    magnitude,
    mismatches,
    problem,
    truth,
    wide,
)
from tests.tolerances import tolerance

pytestmark = pytest.mark.oldest_only

LOW = [jnp.float32, jnp.bfloat16]


def worse_than_automatic(row, dtype):
    """The leaves whose hand-written cotangent is further from the truth than the automatic one.

    The truth is that of the very numbers that were rounded to the dtype.
    """
    arguments, dy = problem(row, dtype)

    @jax.jit
    def both(arguments, dy):
        return hand_written(row, arguments, dy), automatic(row.reference, arguments, dy)

    ours, theirs = both(arguments, dy)
    with jax.enable_x64(True):
        exact = wide(arguments)
        y = jax.eval_shape(row.reference, *exact)
        error = jax.tree.map(lambda dy, y: dy.astype(y.dtype), wide(dy), y)
        _, expected = truth(row)(exact, error)
    largest = max(map(magnitude, expected.values()), default=0.0)

    def size(leaf):
        """That of its terms where they cancel, as the errors of a bias of keys do."""
        return magnitude(leaf) if magnitude(leaf) > 1e-9 * largest else largest

    limits = {
        path: 2 * distance(theirs[path], leaf) + tolerance(dtype, length(dy, expected), size(leaf))
        for path, leaf in expected.items()
    }
    return mismatches(ours, floating(arguments)[0]) + [
        f"{path}: off by {worst:.2e}, where {limits[path]:.2e} is rounding"
        for path, leaf in expected.items()
        if not (worst := distance(ours[path], leaf)) <= limits[path]
    ]


@pytest.mark.parametrize("row", DISTINCT, ids=repr)
def test_no_cotangent_is_further_from_the_truth_than_the_automatic_one(row):
    dtypes = LOW if row in FIRST else LOW[-1:]
    found = {dtype.__name__: worse_than_automatic(row, dtype) for dtype in dtypes}
    assert not any(found.values()), found


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_cotangent_has_the_dtype_of_its_primal_whatever_the_others_have(row):
    arguments = arguments_of(row)
    for dtypes in ([jnp.bfloat16, jnp.float32], [jnp.float32, jnp.bfloat16]):
        own = itertools.cycle(dtypes)
        mixed = jax.tree.map(lambda x, own=own: _cast(x, next(own)), arguments)
        dy = jax.eval_shape(row.reference, *mixed)
        cotangents = jax.eval_shape(lambda *given: hand_written(row, *given), mixed, dy)
        assert mismatches(cotangents, floating(mixed)[0]) == []


def _cast(x, dtype):
    return x.astype(dtype) if is_floating(x) else x


SUMS = {
    "Outer": lambda x, dy: Outer(x, dy),
    "Total": lambda x, dy: Total(dy),
    "Rows": lambda x, dy: Rows(jnp.zeros(len(dy), jnp.int32), dy),
    "Many": lambda x, dy: Many((Total(dy), Total(dy))),
}


@pytest.mark.parametrize("kind", SUMS)
def test_a_long_sum_of_bfloat16_errors_is_as_exact_as_one_of_float32(kind):
    """The sum of 16,384 errors of one sign, which bfloat16 cannot count beyond 256."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.uniform(0.5, 1, (16384, 2)), jnp.bfloat16) for _ in range(2))
    param = jnp.zeros({"Outer": (2, 2), "Rows": (3, 2)}.get(kind, (2,)))
    got = total(SUMS[kind](x, dy), param)
    with jax.enable_x64(True):
        exact = total(SUMS[kind](wide(x), wide(dy)), wide(param))
    assert got.dtype == jnp.float32
    assert distance(got, exact) <= tolerance(jnp.float32, len(dy), magnitude(exact))
