"""On eight devices every row gives what it gives on one, sharded as its arguments are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import backhand as bh
from backhand.catalogue import ROWS, Spec
from tests.conformance.checks import (
    DISTINCT,
    FIRST,
    arguments_of,
    automatic,
    by_path,
    call,
    differences,
    floating,
    hand_written,
    length,
    magnitude,
    problem,
    truth,
)
from tests.tolerances import tolerance

pytestmark = pytest.mark.usefixtures("x64")


AXES = ("model", "data")


def mesh_of(kind):
    """Four ways to split the batch, two to split a weight."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def splits(row, arguments, axis=None):
    """How arguments are split: a batch over `data`, the last axis of a parameter over `axis`."""

    def of_spec(spec):
        if spec.wide and not spec.axes.startswith("B"):
            return of_parameter(spec.axes.split())
        return P("data") if spec.axes.startswith("B") else P()

    def of_parameter(axes):
        return P(*[None] * (len(axes) - 1), axis)

    if isinstance(row.function, bh.Op):
        return jax.tree.map(of_spec, row.inputs)
    params = jax.tree.map(lambda leaf: of_parameter(leaf.shape), arguments[0])
    side = {name: spec for name, spec in row.side.items() if isinstance(spec, Spec)}
    return (params, *jax.tree.map(of_spec, (*row.inputs, side)))


# A weight split over `model` shows the rest of what one that is not split shows: where a weight may
# be split, only the first row of a name is taken with whole weights and over `data` too.
PARAMETRIC = [row for row in ROWS if "model" in str(splits(row, arguments_of(row), "model"))]
PLACED = [row for row in PARAMETRIC if row in FIRST]
SPLITTABLE = [row for row in PARAMETRIC if "split parameters" not in row.without]
WHOLE = [row for row in DISTINCT if row in FIRST or row not in SPLITTABLE]
SPLITS = [(row, axis) for row in SPLITTABLE for axis in AXES if axis == "model" or row in FIRST]
BATCHED = [row for row in FIRST if "data" in str(splits(row, arguments_of(row)))]
UNSPLITTABLE = [row for row in ROWS if "split parameters" in row.without]


def placed(mesh, tree, specs):
    """The arrays, each split over the mesh as its spec says."""
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def assert_agrees(got, expected, dy):
    limit = tolerance(jnp.float64, length(dy, expected), magnitude(dy, expected))
    assert differences(got, expected, limit) == []


@pytest.mark.oldest_only
@pytest.mark.parametrize("row", PLACED, ids=repr)
def test_where_the_compiler_places_arrays_the_cotangents_are_the_same(row):
    arguments, dy = problem(row)
    _, expected = truth(row)(arguments, dy)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        split = placed(mesh, arguments, splits(row, arguments, "model"))
        got = jax.jit(lambda *given: hand_written(row, *given))(split, dy)
    assert_agrees(got, expected, dy)


def explicit(row, axis):
    """The row on a mesh of explicit axes, its parameters split over one: got, expected, primals."""
    arguments, dy = problem(row)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = placed(mesh, arguments, splits(row, arguments, axis))
        y = jax.eval_shape(lambda *given: row.forward(*given)[0], *split)
        shardings = jax.tree.map(lambda y: NamedSharding(mesh, y.sharding.spec), y)
        error = jax.device_put(dy, shardings)
        got = jax.jit(lambda *given: hand_written(row, *given))(split, error)
    return got, truth(row)(arguments, dy)[1], floating(split)[0], dy


def assert_split_alike(got, primals):
    """Shape, dtype and sharding of each cotangent are its primal's."""
    types = (
        {path: str(jax.typeof(leaf)) for path, leaf in tree.items()} for tree in (got, primals)
    )
    assert next(types) == next(types)


@pytest.mark.parametrize("row", WHOLE, ids=repr)
def test_on_explicit_axes_a_cotangent_is_split_as_its_primal(row):
    got, expected, primals, dy = explicit(row, None)
    assert_agrees(got, expected, dy)
    assert_split_alike(got, primals)


@pytest.mark.oldest_only
@pytest.mark.parametrize(("row", "axis"), SPLITS, ids=repr)
def test_parameters_may_be_split_over_any_axis_of_the_mesh(row, axis):
    """Over that of the batch too, where each device then keeps a part of every weight."""
    got, expected, primals, dy = explicit(row, axis)
    assert_agrees(got, expected, dy)
    assert_split_alike(got, primals)


@pytest.mark.parametrize("row", UNSPLITTABLE, ids=repr)
def test_what_cannot_have_split_parameters_says_so_itself(row):
    with pytest.raises(TypeError, match="must have equal types"):
        explicit(row, "model")


@pytest.mark.parametrize("row", BATCHED, ids=repr)
def test_inside_shard_map_a_replicated_weight_gets_the_sum_over_the_shards(row):
    """By the backward, and by `jax.vjp` of the call."""
    arguments, dy = problem(row, B=8)
    specs = splits(row, arguments)
    error_specs = jax.tree.map(lambda leaf: P("data") if leaf.ndim else P(), dy)
    of_cotangents = {path: by_path(specs)[path] for path in floating(arguments)[0]}

    def inside(arguments, dy):
        varying = jax.tree.map(_varying, dy)
        return hand_written(row, arguments, dy), automatic(call(row), arguments, varying)

    mesh = mesh_of(AxisType.Auto)
    sharded = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(specs, error_specs),
        out_specs=(of_cotangents, of_cotangents),
        axis_names={"data"},
    )
    by_backward, by_vjp = jax.jit(sharded)(arguments, dy)

    shards = [
        (_shard(arguments, specs, index), _shard(dy, error_specs, index))
        for index in range(mesh.shape["data"])
    ]
    single = truth(row)
    parts = [single(*shard)[1] for shard in shards]
    expected = {
        path: (np.concatenate if "data" in spec else sum)(
            [np.asarray(part[path]) for part in parts]
        )
        for path, spec in of_cotangents.items()
    }
    assert_agrees(by_backward, expected, dy)
    assert_agrees(by_vjp, expected, dy)


def _varying(leaf):
    """The leaf as one that differs between the shards, as the output that it is the error of."""
    known = "data" in jax.typeof(leaf).manual_axis_type.varying
    return leaf if known else jax.lax.pcast(leaf, "data", to="varying")


def _shard(tree, specs, index):
    """What one of the four shards holds."""
    return jax.tree.map(
        lambda leaf, spec: np.split(leaf, 4)[index] if "data" in spec else leaf, tree, specs
    )
