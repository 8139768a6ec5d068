"""The three products against loops over places and taps, in every way that they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from backhand.ops import convolution_lax, convolution_products
from backhand.ops.convolution_geometry import Geometry
from tests.support import assert_close, normal, temporary_bytes


def by_loops(x, w, y, windows):
    """The three sums over all triples that meet, one after the other."""
    outcome = np.zeros_like(y), np.zeros_like(x), np.zeros_like(w)
    inputs, outputs = w.shape[-2], w.shape[-1] // windows.groups
    for place in np.ndindex(*y.shape[1:-1]):
        for tap in np.ndindex(*w.shape[:-2]):
            at = tuple(
                s * p + d * k - lo
                for s, p, d, k, (lo, _) in zip(
                    windows.stride, place, windows.dilation, tap, windows.padding, strict=True
                )
            )
            if not all(0 <= q < n for q, n in zip(at, x.shape[1:-1], strict=True)):
                continue
            for g in range(windows.groups):
                i = slice(g * inputs, (g + 1) * inputs)
                o = slice(g * outputs, (g + 1) * outputs)
                seen, own = x[(slice(None), *at, i)], w[(*tap, slice(None), o)]
                error = y[(slice(None), *place, o)]
                outcome[0][(slice(None), *place, o)] += seen @ own
                outcome[1][(slice(None), *at, i)] += error @ own.T
                outcome[2][(*tap, slice(None), o)] += seen.T @ error
    return outcome


@st.composite
def problems(draw):
    """Windows that fit into inputs of one to three spatial axes."""
    rank = draw(st.integers(1, 3))

    def several(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, dilation = several(1, (4, 3, 2)[rank - 1]), several(1, 3), several(1, 2)
    padding = tuple(zip(several(0, 3), several(0, 3), strict=True))
    groups, own, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    sizes = tuple(
        max(n, d * (k - 1) + 1 - sum(pad))
        for n, d, k, pad in zip(several(1, 5), dilation, kernel, padding, strict=True)
    )
    channels = groups * own, groups * outputs
    return draw(st.integers(0, 3)), sizes, kernel, (stride, padding, dilation, groups), channels


def ways(x, w, y, windows):
    """All of `products` as chosen here, and as XLA's convolutions."""
    sizes, kernel = x.shape[1:-1], w.shape[:-2]
    return [
        (
            module.correlate(x, w, windows),
            module.scatter(y, w, windows, sizes),
            module.weights(x, y, windows, kernel),
        )
        for module in (convolution_products, convolution_lax)
    ]


COMPILED = jax.jit(ways, static_argnums=3)


@settings(max_examples=40)
@given(problems())
def test_any_windows_give_the_sums_over_all_that_meet(problem):
    batch, sizes, kernel, settings, (inputs, outputs) = problem
    windows = Geometry(*settings)
    x = np.asarray(normal(0, batch, *sizes, inputs), np.float64)
    w = np.asarray(normal(1, *kernel, inputs // windows.groups, outputs), np.float64)
    y = np.asarray(normal(2, batch, *windows.places(sizes, kernel), outputs), np.float64)
    expected = by_loops(x, w, y, windows)
    with jax.enable_x64(True):
        for found in COMPILED(x, w, y, windows):
            assert_close(found, jax.tree.map(jnp.asarray, expected))


def test_both_ways_back_together_are_those_apart(x64, monkeypatch):
    monkeypatch.setattr(convolution_products, "SMALL", 0)
    monkeypatch.setattr(convolution_products, "MANY", 0)
    windows = Geometry((1, 1), ((1, 1), (0, 2)), (1, 1), 1)
    x, w = normal(0, 16, 6, 7, 3), normal(1, 3, 3, 3, 4)
    y = normal(2, 16, *windows.places((6, 7), (3, 3)), 4)
    assert convolution_products._together_on_cpu(x, y, w, windows)
    together = jax.jit(convolution_products.scatter_and_weights, static_argnums=3)(x, y, w, windows)
    apart = (
        convolution_lax.scatter(y, w, windows, (6, 7)),
        convolution_lax.weights(x, y, windows, (3, 3)),
    )
    assert_close(together, apart)


@pytest.mark.parametrize("own", [2, 20])
def test_groups_narrow_and_wide_are_what_the_compilers_are(own):
    windows = Geometry((1, 1), ((1, 1), (2, 0)), (1, 1), 2)
    x, w, y = (
        normal(0, 3, 6, 7, 2 * own),
        normal(1, 3, 3, own, 2 * own),
        normal(2, 3, 6, 7, 2 * own),
    )

    @jax.jit
    def both():
        return [
            (
                of.correlate(x, w, windows),
                of.scatter(y, w, windows, (6, 7)),
                of.weights(x, y, windows, (3, 3)),
            )
            for of in (convolution_products, convolution_lax)
        ]

    assert_close(*both(), 1e-6)


@pytest.mark.parametrize(
    ("own", "size", "taps", "dtype", "by_products"),
    [
        (8, 16, 3, "float32", True),
        (8, 16, 3, "bfloat16", False),
        (8, 16, 9, "float32", False),  # more taps than are written out
        (20, 16, 3, "float32", False),
        (8, 600, 3, "float32", False),  # an example is more than a block
    ],
)
def test_rows_of_narrow_groups_are_shifted(own, size, taps, dtype, by_products):
    windows = Geometry((1, 1), ((taps // 2, taps // 2),) * 2, (1, 1), 4)
    x = jax.ShapeDtypeStruct((2, size, size, 4 * own), dtype)
    w = jax.ShapeDtypeStruct((taps, taps, own, 4 * own), dtype)
    there = functools.partial(convolution_products.correlate, windows=windows)
    back = functools.partial(convolution_products.scatter, windows=windows, sizes=(size, size))
    for run in (there, back):
        lowered = jax.jit(run).lower(x, w).as_text()
        assert ("stablehlo.convolution" not in lowered) == by_products


@pytest.mark.parametrize(
    ("shape", "groups", "taps", "dtype", "by_products", "in_parts"),
    [
        ((32, 16, 16, 64), 2, 3, "float32", True, True),
        ((32, 16, 16, 64), 8, 3, "float32", True, False),  # narrow groups, one after another
        ((32, 16, 16, 64), 2, 5, "float32", True, False),  # larger sums are slower in parts
        ((32, 16, 16, 64), 2, 3, "bfloat16", False, False),
        ((4, 7, 7, 512), 2, 3, "float32", False, False),  # the weight is large beside x
        ((4, 14, 14, 1024), 32, 3, "float32", True, True),  # large beside x only in all
        ((32, 16, 16, 64), 2, 1, "float32", True, False),
    ],
)
def test_how_the_weights_of_groups_are_summed(shape, groups, taps, dtype, by_products, in_parts):
    windows = Geometry((1, 1), ((taps // 2, taps // 2),) * 2, (1, 1), groups)
    x = jax.ShapeDtypeStruct(shape, dtype)
    run = functools.partial(convolution_products.weights, windows=windows, kernel=(taps, taps))
    lowered = jax.jit(run).lower(x, x).as_text()
    assert ("stablehlo.convolution" not in lowered) == by_products
    assert ("batching_dims" in lowered) == in_parts


def test_memory_of_many_wide_groups_is_that_of_a_block():
    windows = Geometry((1, 1), ((1, 1),) * 2, (1, 1), 32)
    x = jax.ShapeDtypeStruct((4, 14, 14, 1024), "float32")
    run = functools.partial(convolution_products.weights, windows=windows, kernel=(3, 3))
    assert temporary_bytes(run, x, x) < 3e6


def test_what_is_called_twice_outside_of_a_program_is_compiled_once(nothing_compiles):
    for x, w, groups in (
        (normal(0, 2, 4, 4, 4), normal(1, 3, 3, 2, 4), 2),
        (normal(0, 1, 3, 4, 4, 2), normal(1, 2, 3, 3, 2, 2), 1),
    ):
        bh.ops.convolution(x, w, groups=groups)
        with nothing_compiles():
            bh.ops.convolution(x, w, groups=groups)


def test_a_weight_that_is_large_beside_planes_is_left_to_xla():
    windows = Geometry((1, 1, 1), ((1, 1),) * 3, (1, 1, 1), 1)
    x, w = normal(0, 2, 4, 4, 4, 8), normal(1, 3, 3, 3, 8, 8)
    lowered = jax.jit(lambda x, w: convolution_products.correlate(x, w, windows)).lower(x, w)
    assert "while" not in lowered.as_text()


def test_very_many_outputs_of_a_channel_are_products_not_taken_in_turn():
    windows = Geometry((1, 1), ((1, 1),) * 2, (1, 1), 2)
    x, y = (jax.ShapeDtypeStruct((4, 8, 8, own), "float32") for own in (2, 2 * 128))
    run = functools.partial(convolution_products.weights, windows=windows, kernel=(3, 3))
    assert "length=128" not in str(jax.make_jaxpr(run)(x, y))
