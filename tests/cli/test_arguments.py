"""Arrays in words: their dtypes, shapes and borders, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.cli.arguments import DTYPES, array, arrays, parameters
from backhand.cli.targets import BadUsage


def made(text):
    return array(text, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [
        ("f32[4,8]", jnp.float32, (4, 8)),
        ("float32[4, 8]", jnp.float32, (4, 8)),
        ("bf16[3]", jnp.bfloat16, (3,)),
        ("f16[]", jnp.float16, ()),
        ("f32[0,2]", jnp.float32, (0, 2)),
        ("i32[5]<10", jnp.int32, (5,)),
        ("u8[5]<256", jnp.uint8, (5,)),
        ("bool[7]", jnp.bool_, (7,)),
    ],
)
def test_an_array_has_the_dtype_and_shape_that_are_written(text, dtype, shape):
    x = made(text)
    assert isinstance(x, jax.Array)
    assert (x.dtype, x.shape) == (dtype, shape)


def test_integers_stay_below_their_border():
    assert set(made("i32[200]").tolist()) == {0, 1}
    assert set(made("i32[500]<5").tolist()) == {0, 1, 2, 3, 4}


def test_a_key_is_a_key():
    assert jnp.issubdtype(made("key").dtype, jax.dtypes.prng_key)


def test_64_bits_are_made_where_they_are_switched_on(x64):
    assert made("f64[2]").dtype == jnp.float64


def test_arrays_differ_and_come_back_from_the_seed():
    a, b = arrays(["f32[4]", "f32[4]"], seed=1)
    assert not np.array_equal(a, b)
    assert np.array_equal(a, arrays(["f32[4]"], seed=1)[0])
    assert not np.array_equal(a, arrays(["f32[4]"], seed=2)[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4,8", r"is no dtype and shape; write f32\[4,8\]"),
        ("f32[4,8", "is no dtype and shape"),
        ("f32[-1]", "is no dtype and shape"),
        ("f23[4]", "there is no dtype 'f23'; did you mean 'f32'"),
        ("x[4]", "there is no dtype 'x'; the dtypes are f16, bf16"),
        ("f64[4]", "unless JAX_ENABLE_X64=1 is set; .* give 32 bits"),
        ("i64[4]", "unless JAX_ENABLE_X64=1"),
        ("f32[4]<3", "only integers have a border"),
        ("i32[4]<0", "no int32 numbers from 0 to below 0"),
        ("u8[4]<257", "no uint8 numbers from 0 to below 257"),
    ],
)
def test_what_is_no_array_is_refused_in_one_sentence(text, said):
    with pytest.raises(BadUsage, match=said) as caught:
        made(text)
    assert "\n" not in str(caught.value)


def test_every_short_name_is_a_dtype():
    assert {jnp.dtype(name).name for name in DTYPES.values()} == set(DTYPES.values())


def test_parameters_are_moved_away_from_where_they_begin():
    layer = bh.chain(bh.dense(3), bh.batch_norm())
    params = parameters(layer, jnp.ones((4, 2)), seed=0)
    assert (params[0]["b"] != 0).all()
    assert (params[1]["scale"] > 1).all()
    assert (params[1]["running"].var > 0).all()
