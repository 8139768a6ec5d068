"""The products as XLA's convolutions: on a mesh too, where its partitioner can go wrong."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from backhand.ops import convolution_lax
from backhand.ops.convolution_geometry import Geometry
from tests.support import assert_close, normal


def test_on_a_mesh_with_an_axis_to_spare_no_weight_is_counted_twice(x64):
    windows = Geometry((1,), ((0, 0),), (1,), 8)
    x, y = normal(0, 4, 6, 8), normal(1, 4, 3, 16)
    expected = convolution_lax.weights(x, y, windows, (4,))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = [jax.device_put(leaf, NamedSharding(mesh, P("data"))) for leaf in (x, y)]
        found = jax.jit(lambda x, y: convolution_lax.weights(x, y, windows, (4,)))(*split)
    assert_close(jax.device_get(found), jax.device_get(expected))


def test_turned_twice_a_weight_is_itself():
    w = normal(0, 3, 2, 4, 6)
    once = convolution_lax.turned(w, 2)
    assert once.shape == (3, 2, 3, 8)
    np.testing.assert_array_equal(convolution_lax.turned(once, 2), w)


def test_every_convolution_has_its_axes_in_the_order_of_fast_kernels():
    """XLA moves them there by itself, but not in a loop, such as that over micro-batches."""
    windows = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    x, y, w = normal(0, 2, 5, 5, 3), normal(1, 2, 5, 5, 4), normal(2, 3, 3, 3, 4)
    for run in (
        lambda: convolution_lax.correlate(x, w, windows),
        lambda: convolution_lax.scatter(y, w, windows, (5, 5)),
        lambda: convolution_lax.weights(x, y, windows, (3, 3)),
    ):
        equations = jax.make_jaxpr(run)().eqns
        (own,) = [e.params for e in equations if e.primitive.name == "conv_general_dilated"]
        orders = own["dimension_numbers"]
        assert tuple(orders) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
