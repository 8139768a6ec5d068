"""What every row of the catalogue is held to: its hand-written pass beside its reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh
from backhand.arrays import is_floating
from backhand.catalogue import ROWS
from tests.tolerances import tolerance

NAMES = [repr(row) for row in ROWS]


def arguments_of(row, dtype=jnp.float32, seed=0, **sizes):
    """The row's arguments, made once for all of its tests: a layer's parameters take a trace."""
    return _arguments(row, jnp.dtype(dtype), seed, jnp.result_type(float), **sizes)


@functools.cache
def _arguments(row, dtype, seed, default, **sizes):
    """`default` is float64 where that is enabled: what is cached there is of no use elsewhere."""
    return row.arguments(dtype, seed, **sizes)


def is_an_op(row):
    """Whether a layer is nothing but an op, so that its op's row shows all but its rule."""
    name = row.name.removeprefix("layers.")
    return name != row.name and name in bh.ops.__all__ and not (row.side or arguments_of(row)[0])


# Where a row costs seconds, what runs the same program as another is left out; and where a setting
# changes next to nothing, only the first row of a name is taken.
DISTINCT = [row for row in ROWS if not is_an_op(row)]
FIRST = list({row.name: row for row in reversed(DISTINCT)}.values())[::-1]


def random_like(y, seed=7):
    """A random error for every leaf of an output, in its dtype."""
    leaves, structure = jax.tree.flatten(y)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=y.shape), y.dtype) for y in leaves])


def problem(row, dtype=jnp.float64, seed=0, **sizes):
    """The row's arguments and a random error of its output."""
    return _problem(row, jnp.dtype(dtype), seed, jnp.result_type(float), **sizes)


@functools.cache
def _problem(row, dtype, seed, default, **sizes):
    arguments = _arguments(row, dtype, seed, default, **sizes)
    return arguments, random_like(jax.eval_shape(row.reference, *arguments), seed + 7)


def by_path(tree):
    """The leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def floating(arguments):
    """The floating-point leaves by path, and the function that puts others in their place."""
    paths, structure = jax.tree.flatten_with_path(arguments)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    return (
        {path: leaf for path, leaf in leaves.items() if is_floating(leaf)},
        lambda others: structure.unflatten((leaves | others).values()),
    )


def wide(tree):
    """The same numbers in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if is_floating(x) else x, tree)


def aligned(arguments, cotangents):
    """The cotangents by the paths of the floating-point leaves that they belong to.

    Raises:
        AssertionError: if one is missing, or an integer, a boolean or a key has one.
    """
    assert len(arguments) == len(cotangents), f"{len(cotangents)} cotangents"
    found = {}
    for index, (argument, cotangent) in enumerate(zip(arguments, cotangents, strict=True)):
        primals, structure = jax.tree.flatten_with_path(argument)
        leaves = (
            structure.flatten_up_to(cotangent) if cotangent is not None else [None] * len(primals)
        )
        for (path, primal), leaf in zip(primals, leaves, strict=True):
            name = f"[{index}]{jax.tree_util.keystr(path)}"
            if is_floating(primal):
                assert leaf is not None, f"{name} has no cotangent"
                found[name] = leaf
            else:
                none = leaf is None or leaf.dtype == jax.dtypes.float0
                assert none, f"{name} is {primal.dtype} and has a cotangent"
    return found


def hand_written(row, arguments, dy):
    """The cotangents of the row's own backward, by path."""
    _, residuals = row.forward(*arguments)
    return aligned(arguments, row.backward(arguments, residuals, dy))


def automatic(function, arguments, dy):
    """The cotangents that JAX finds for a function of the arguments, by path."""
    leaves, rebuild = floating(arguments)
    return jax.vjp(lambda leaves: function(*rebuild(leaves)), leaves)[1](dy)[0]


@functools.cache
def truth(row):
    """The reference's output and cotangents: one program for every test of a row, traced once."""

    @jax.jit
    def of_reference(arguments, dy):
        return row.reference(*arguments), automatic(row.reference, arguments, dy)

    return of_reference


def both_sides(op, arguments, dy):
    """Output and cotangents by path: by hand, and by JAX of the reference."""
    y, residuals = op.forward(*arguments)
    ours = y, aligned(arguments, op.cotangents(residuals, dy))
    return ours, (op.reference(*arguments), automatic(op.reference, arguments, dy))


def call(row):
    """The row as a function whose `jax.grad` runs the hand-written backward."""
    if isinstance(row.function, bh.Op):
        return row.function
    function = bh.differentiable(row.function)
    return lambda params, x, side: function(params, x, **side, **row.plain)


def magnitude(*trees):
    """The largest number anywhere."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(trees)]
    return max((float(np.abs(leaf).max(initial=0)) for leaf in leaves), default=0.0)


def length(*trees):
    """The most terms that any sum over these arrays can have."""
    return max((leaf.size for leaf in jax.tree.leaves(trees)), default=1)


def distance(a, b):
    """The largest difference; infinite where one of them is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max(initial=0))


def mismatches(got, like):
    """Where shapes or dtypes by path are not those of the others."""
    if got.keys() != like.keys():
        return [f"{sorted(got)} are not {sorted(like)}"]
    described = {
        path: [
            f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (got[path], like[path])
        ]
        for path in like
    }
    return [f"{path}: {a} for {b}" for path, (a, b) in described.items() if a != b]


def differences(got, truth, limit):
    """Where leaves by path are not those of the truth, in float64."""
    found = mismatches(got, truth)
    return found or [
        f"{path}: off by {worst:.2e}, where {limit:.2e} is rounding"
        for path in truth
        if (worst := distance(got[path], truth[path])) > limit
    ]


def faults(row):
    """All that is wrong with a row in float64: its output, and every leaf of every cotangent.

    Forward and backward are two programs, so that the residuals cross the border between them.
    """
    arguments, dy = problem(row)
    y, residuals = jax.jit(row.forward)(*arguments)
    result = jax.jit(row.backward)(arguments, residuals, dy)
    try:
        cotangents = aligned(arguments, result)
    except AssertionError as error:
        return [str(error)]

    return unlike((y, cotangents), truth(row)(arguments, dy), arguments, dy)


def unlike(got, expected, arguments, dy):
    """Where output and cotangents by path are not those of the reference, in float64."""
    (y, cotangents), (expected_y, expected) = got, expected
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected_y, expected))
    return [
        *(f"y{fault}" for fault in differences(by_path(y), by_path(expected_y), limit)),
        *mismatches(cotangents, floating(arguments)[0]),
        *differences(cotangents, expected, limit),
    ]
