"""What else arrives at an op or a layer: views of NumPy arrays, and integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.arrays import is_floating
from backhand.catalogue import ROWS
from tests.conformance.checks import (
    FIRST,
    NAMES,
    aligned,
    arguments_of,
    by_path,
    call,
    differences,
    floating,
    length,
    magnitude,
    problem,
    random_like,
    truth,
)
from tests.tolerances import tolerance

pytestmark = pytest.mark.oldest_only


def view(leaf):
    """The same numbers in a NumPy array that is not contiguous."""
    if leaf.ndim == 0 or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    found = np.repeat(np.asarray(leaf), 2, axis=-1)[..., ::2]
    found = found if leaf.ndim == 1 else np.asfortranarray(leaf)[::-1][::-1]
    assert not found.flags.c_contiguous
    return found


@pytest.mark.parametrize("row", FIRST, ids=repr)
def test_a_view_of_a_numpy_array_is_as_good_as_an_array(row, x64, unchecked):
    """They are constants of the program, so that every function sees the views themselves."""
    arguments, dy = problem(row)
    views = jax.tree.map(view, arguments)

    @jax.jit
    def run(dy):
        y, back = jax.vjp(call(row), *views)
        again = y
        if isinstance(row.function, bh.Layer):
            again = row.function(views[0], views[1], **views[2], **row.plain)
        return y, again, back(dy)

    expected_y, expected = truth(row)(arguments, dy)
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected_y, expected))
    y, again, cotangents = run(dy)
    assert differences(by_path(y), by_path(expected_y), limit) == []
    assert differences(by_path(again), by_path(expected_y), limit) == []
    assert differences(aligned(arguments, cotangents), expected, limit) == []


# Only move numbers, whatever they are; or a table, which is a parameter. Targets, weights and the
# parameters of an op may be integers too.
TAKE_INTEGERS = {
    "combinators.on",
    "combinators.pick",
    "combinators.rename",
    "layers.flatten",
    "layers.reshape",
    "ops.embedding",
    "ops.flatten",
    "ops.reshape",
}


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_integers_are_refused_with_advice_or_have_no_cotangent(row, unchecked):
    """Each floating-point input in turn."""
    arguments = arguments_of(row)
    params = isinstance(row.function, bh.Layer)
    inputs, rebuild = floating(arguments[1:2] if params else arguments)
    for path, leaf in inputs.items():
        given = rebuild({path: leaf.astype(jnp.int32)})
        given = (arguments[0], *given, arguments[2]) if params else given

        def cotangents(given):
            y, residuals = row.forward(*given)
            dy = random_like(y)
            if all(is_floating(leaf) for leaf in jax.tree.leaves(y)):
                aligned(given, row.backward(given, residuals, dy))
            return y

        try:
            jax.eval_shape(cotangents, given)
        except (TypeError, ValueError) as error:
            assert "int32" in str(error) and "needs" in str(error)
        else:
            kind = row.name.split(".")[0]
            assert row.name in TAKE_INTEGERS or (kind in ("losses", "ops") and path != "[0]")
