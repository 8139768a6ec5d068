"""A row is data: its arrays have the kinds, shapes and dtypes that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.catalogue import KINDS, ROWS, SIZES, Row, Spec, make
from backhand.contributions import Running

PROPERTIES = {
    "normal": lambda x: x.min() < 0 < x.max(),
    "positive": lambda x: x.min() > 0,
    "shares": lambda x: x.min() >= 0 and x.max() <= 1,
    "probabilities": lambda x: np.allclose(x.sum(-1), 1) and x.min() >= 0,
    "weights": lambda x: x.min() == 0 < x.max(),
    "ids": lambda x: x.dtype == np.int32 and x.min() >= 0 and x.max() < SIZES["V"],
    "mask": lambda x: x.dtype == bool and x.any() and not x.all(),
}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"key"}))
def test_an_array_has_the_values_of_its_kind(kind):
    x = np.asarray(make(Spec(kind, "B T V", below="V")))
    assert x.shape == (4, 3, 12) and PROPERTIES[kind](x)


def test_a_key_is_typed():
    assert jnp.issubdtype(make(Spec("key")).dtype, jax.dtypes.prng_key)


def test_activations_have_the_dtype_asked_for_and_wide_arrays_at_least_float32(x64):
    specs = (Spec("normal", "B"), Spec("normal", "D", wide=True))
    for dtype, wide in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        assert [leaf.dtype for leaf in make(specs, dtype)] == [dtype, wide]


def test_sizes_change_every_axis_of_their_name_and_numbers_stay():
    a, b = make((Spec("normal", "B 2 D"), Spec("ids", "B", below="D")), B=1, D=1)
    assert a.shape == (1, 2, 1) and b.tolist() == [0]


def test_the_same_seed_gives_the_same_arrays_and_arguments_differ_from_one_another():
    specs = (Spec("normal", "B"), Spec("normal", "B"))
    (a, b), (again, _), (other, _) = make(specs), make(specs), make(specs, seed=1)
    assert a.tolist() == again.tolist()
    assert a.tolist() != b.tolist() and a.tolist() != other.tolist()


def test_an_unknown_kind_or_axis_is_an_error():
    with pytest.raises(KeyError):
        make(Spec("strange", "B"))
    with pytest.raises(ValueError, match="Q"):
        make(Spec("normal", "Q"))


def test_parameters_of_a_layer_have_the_structure_that_init_gives_and_no_zero():
    row = Row("layers.batch_norm", bh.batch_norm, (Spec("normal", "B D"),), {}, {"training": True})
    params, x, side = row.arguments(jnp.bfloat16)
    initial = bh.batch_norm().init(jax.random.key(0), x)
    assert bh.protocol.shapes_of(params) == bh.protocol.shapes_of(initial)
    assert isinstance(params["running"], Running) and params["running"].var.min() > 0
    assert all(leaf.all() for leaf in jax.tree.leaves(params))
    assert side == {} and row.plain == {"training": True}


def test_a_row_reads_as_the_call_that_it_is():
    assert repr(ROWS[0]) == "ops.relu()"
    row = Row("ops.gelu", bh.ops.gelu, (Spec("shares", "B"),), {"approximate": True})
    assert repr(row) == "ops.gelu(shares, approximate=True)"
