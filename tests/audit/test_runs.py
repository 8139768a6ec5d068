"""A subject's runs: each made once, in any dtype, from the same cotangents."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from backhand.audit.runs import COTANGENTS, Runs
from backhand.audit.subjects import subject_of
from tests.support import normal

X, W = normal(0, 4, 3), normal(1, 3, 2)


def runs(function=jnp.matmul, args=(X, W), reference=jnp.matmul, seed=0):
    return Runs(subject_of(function, args, reference), seed)


def test_both_sides_are_run_under_every_cotangent():
    run = runs().at(jnp.float64)
    assert [leaf.shape for leaf in run.ours] == [(COTANGENTS, 4, 3), (COTANGENTS, 3, 2)]
    assert run.y[0].shape == run.reference_y[0].shape == (4, 2)
    np.testing.assert_array_equal(run.ours[0], run.automatic[0])
    assert len({leaf.tobytes() for leaf in run.ours[0]}) == COTANGENTS


def test_a_run_is_made_once():
    each = runs()
    assert each.at(jnp.float32) is each.at("float32", rounded=jnp.float32)
    assert each.truth(jnp.float32) is each.at(jnp.float64), "float32 numbers are float64 numbers"
    assert each.truth(jnp.bfloat16) is not each.at(jnp.float64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_low_run_is_beside_the_truth_of_its_own_numbers(dtype):
    each = runs()
    low, truth = each.at(dtype), each.truth(dtype)
    np.testing.assert_allclose(low.ours[1], truth.automatic[1], rtol=0.1, atol=0.1)
    rounded = np.asarray(X.astype(dtype), np.float64) @ np.asarray(W.astype(dtype), np.float64)
    np.testing.assert_allclose(truth.reference_y[0], rounded, rtol=1e-14)


def test_cotangents_are_numbers_that_every_dtype_holds():
    for leaf in runs().cotangents[0]:
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            np.testing.assert_array_equal(leaf.astype(dtype).astype(np.float64), leaf)


def test_points_next_to_this_one_show_rounding_that_was_exact_by_luck():
    def unit(x):
        return x / jnp.sqrt(x * x + jnp.where(x == 0, 1.0, 0.0))

    each = runs(unit, (jnp.array([0.5, 0.0, 2.0**-9]),), unit)
    low, truth = each.at(jnp.float32), each.truth(jnp.float32)
    assert not (low.automatic[0] - truth.automatic[0])[:, [0, 2]].any(), "powers of 2 are exact"
    (near,) = each.nearby()
    assert near.shape == (3,)
    assert (near[0] < 1e-6, near[1], near[2] > 1e-6) == (True, 0.0, True)
    assert each.nearby() is each.nearby(), "made once"


def test_the_level_is_what_the_forward_computes_in():
    assert runs().level == jnp.float64
    low = runs(lambda x: jnp.sin(x.astype(jnp.float32)), (X,), jnp.sin)
    assert (low.level, low.resolution) == (jnp.float32, jnp.float32)
    cast = runs(lambda x: x.astype(jnp.bfloat16), (X,), lambda x: x.astype(jnp.bfloat16))
    assert (cast.level, cast.resolution) == (jnp.float64, jnp.bfloat16)


def test_a_subject_that_refuses_float64_is_run_without():
    def kernel(x):
        if x.dtype != jnp.float32:
            raise ValueError("float32 alone")
        return jnp.sin(x)

    each = runs(kernel, (X,), jnp.sin)
    assert "float32 alone" in each.refused
    assert each.level == jnp.float32
    assert each.at(jnp.float64).ours == []
    np.testing.assert_allclose(
        each.at(jnp.float32).ours[0], each.truth(jnp.float32).automatic[0], rtol=1e-5
    )
    with pytest.raises(TypeError, match="in float64 the reference of sin does not run"):
        runs(jnp.sin, (X,), kernel)


def test_without_a_reference_there_is_one_side():
    alone = dataclasses.replace(subject_of(jnp.matmul, (X, W)), reference=None)
    run = Runs(alone).at(jnp.float32)
    assert (run.reference_y, run.automatic) == ([], [])
    assert len(run.ours) == 2


def test_the_length_is_that_of_the_largest_array():
    assert runs().length == 12
