"""Pooling: who wins and gets the error, what a mean is of, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from backhand.ops.pooling_windows import pooling_windows
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal, temporary_bytes


@st.composite
def pools(draw):
    """A shape, and windows that fit it."""
    rank = draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 6 if rank < 3 else 3)) for _ in range(rank)]
    window = tuple(draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank))
    stride = draw(st.none() | st.tuples(*[st.integers(1, 4)] * rank))
    pads = tuple(draw(st.tuples(*[st.integers(0, k - 1)] * 2)) for k in window)
    fits = all(k <= n + sum(p) for k, n, p in zip(window, sizes, pads, strict=True))
    padding = pads if fits else "SAME"
    return (2, *sizes, 2), {"window": window, "stride": stride, "padding": padding}


def problem(index):
    """An op, a shape and settings: one to three axes, windows of each kind of padding."""
    random, rank = np.random.default_rng(index), 1 + index // 4 % 3

    def several(low, high):
        return tuple(int(n) for n in random.integers(low, high + 1, rank))

    window = several(1, 4 if rank < 3 else 2)
    sizes = tuple(max(n, k) for n, k in zip(several(1, 6 if rank < 3 else 3), window, strict=True))
    match index % 4:
        case 0:
            name = ("global_max_pool", "global_average_pool")[index // 4 % 2]
            return getattr(bh.ops, name), sizes, {}
        case 1:
            parts = tuple(int(random.integers(1, n + 1)) for n in sizes)
            return bh.ops.adaptive_average_pool, sizes, {"sizes": parts}
    around = tuple(tuple(int(n) for n in random.integers(0, k, 2)) for k in window)
    padding = ("VALID", "SAME", around)[index // 4 % 3]
    how = {"window": window, "stride": several(1, 4), "padding": padding}
    if index % 4 == 2:
        return bh.ops.max_pool, sizes, how
    return bh.ops.average_pool, sizes, {**how, "count_padding": index // 4 % 2 == 0}


@settings(max_examples=200)
@given(st.integers(0, 47), st.booleans(), st.integers(0, 1000))
def test_any_pool_has_the_gradient_of_the_textbook_form(index, ties, seed):
    """With ties everywhere, or none."""
    op, sizes, how = problem(index)
    random = np.random.default_rng(seed)
    shape = (2, *sizes, 2)
    x = random.integers(0, 3, shape) * 1.0 if ties else random.standard_normal(shape)
    assert_is_its_reference(op, (x,), seed, **how)


def by_hand(x, kind, *, window, stride, padding, count_padding=False):
    """y and the error of x for dy = 1, 2, 3 ..., in loops."""
    given = jax.ShapeDtypeStruct(x.shape, "float32")
    windows = pooling_windows("by hand", given, window, stride, padding)
    y = np.zeros((x.shape[0], *windows.outputs, x.shape[-1]))
    dy = np.arange(1.0, y.size + 1).reshape(y.shape)
    dx = np.zeros(x.shape)
    for where in np.ndindex(y.shape):
        spans = []
        for o, k, s, (before, _), n in zip(
            where[1:-1], windows.window, windows.stride, windows.padding, x.shape[1:-1], strict=True
        ):
            begin = o * s - before
            spans.append(range(max(0, begin), min(n, begin + k)))
        places = [
            (where[0], *(span[i] for span, i in zip(spans, at, strict=True)), where[-1])
            for at in np.ndindex(*map(len, spans))
        ]
        values = [x[place] for place in places]
        if kind == "max":
            best = int(np.argmax(values))
            y[where] = values[best]
            dx[places[best]] += dy[where]
        else:
            count = np.prod(windows.window) if count_padding else len(places)
            y[where] = sum(values) / count
            for place in places:
                dx[place] += dy[where] / count
    return dy, (y, dx)


def both_ways(op, x, dy, **how):
    """y and dx in float64, as one program: each shape and window is compiled anew."""

    @jax.jit
    def run(x, dy):
        y, residuals = op.forward(x, **how)
        return y, op.backward(residuals, dy, **how)

    with jax.enable_x64(True):
        return run(jnp.asarray(x), jnp.asarray(dy))


@settings(max_examples=40)
@given(pools(), st.integers(0, 5))
def test_the_first_of_equals_in_any_window_gets_the_error(pool, seed):
    """Small integers, so that there are ties everywhere."""
    shape, how = pool
    x = np.random.default_rng(seed).integers(0, 3, shape).astype(np.float64)
    dy, truth = by_hand(x, "max", **how)
    y, dx = both_ways(bh.ops.max_pool, x, dy, **how)
    np.testing.assert_array_equal(y, truth[0])
    np.testing.assert_array_equal(dx, truth[1])


@settings(max_examples=40)
@given(pools(), st.booleans())
def test_every_element_of_any_window_gets_its_share(pool, count_padding):
    shape, how = pool
    how = {**how, "count_padding": count_padding}
    x = np.random.default_rng(0).normal(size=shape)
    dy, truth = by_hand(x, "mean", **how)
    y, dx = both_ways(bh.ops.average_pool, x, dy, **how)
    np.testing.assert_allclose(y, truth[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dx, truth[1], rtol=1e-12)


@pytest.mark.parametrize(
    "how",
    [
        {"window": (2, 2)},
        {"window": (3, 3), "stride": (2, 2), "padding": "SAME"},
        {"window": (3, 2), "stride": (1, 1)},
    ],
    ids=repr,
)
@pytest.mark.parametrize("lowest", [0.0, -jnp.inf])
def test_ties_are_broken_as_jax_breaks_them(how, lowest, x64):
    """With padding too, which is -inf, and comes first in the windows in front."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 7, 6, 2)), jnp.float64)
    x = jnp.where(x == 0, lowest, x).at[0].set(lowest)

    @jax.jit
    def both(x):
        op = bh.ops.max_pool
        y, back = jax.vjp(lambda x: op(x, **how), x)
        dy = jnp.arange(1.0, y.size + 1).reshape(y.shape)
        return back(dy), jax.vjp(lambda x: op.reference(x, **how), x)[1](dy)

    ours, theirs = both(x)
    assert_close(ours, theirs, 0)
    assert ours[0].any()


def test_one_size_is_for_all_axes(unchecked):
    x = normal(0, 2, 6, 6, 3)
    for op in (bh.ops.max_pool, bh.ops.average_pool):
        expected = op(x, window=(3, 3), stride=(2, 2))
        for window, stride in ((3, 2), (np.int64(3), np.array([2, 2]))):
            assert_close(op(x, window=window, stride=stride), expected)
            assert_close(op.reference(x, window=window, stride=stride), expected, 1e-6)
    y = bh.ops.adaptive_average_pool(x, sizes=4)
    assert_close(y, bh.ops.adaptive_average_pool(x, sizes=(4, 4)))
    assert bh.max_pool(2)({}, x).shape == bh.average_pool(2, stride=2)({}, x).shape == (2, 3, 3, 3)
    assert bh.adaptive_average_pool(2)({}, x).shape == (2, 2, 2, 3)


def test_nan_shows_and_is_blamed():
    x = jnp.array([1.0, jnp.nan, 3.0, 4.0]).reshape(1, 4, 1)
    y, back = jax.vjp(lambda x: bh.ops.max_pool(x, window=(2,)), x)
    assert np.isnan(y[0, 0, 0]) and y[0, 1, 0] == 4
    assert back(jnp.ones_like(y))[0].ravel().tolist() == [0, 1, 0, 1]


def test_the_winner_is_a_byte_and_nothing_is_saved_for_a_mean():
    x = normal(0, 2, 8, 8, 3)
    saved = jax.tree.leaves(bh.ops.max_pool.forward(x, window=(2, 2))[1])
    assert [(leaf.dtype, leaf.shape) for leaf in saved] == [("uint8", (2, 4, 4, 3))]
    wide = jax.tree.leaves(bh.ops.max_pool.forward(normal(0, 1, 300, 1), window=(300,))[1])
    assert wide[0].dtype == "uint16"
    assert jax.tree.leaves(bh.ops.average_pool.forward(x, window=(2, 2))[1]) == []


def test_a_mean_of_bfloat16_is_summed_in_float32():
    """256 ones and a half: in bfloat16 the sum would stay at 256."""
    x = jnp.full((1, 512, 1), 1.0078125, jnp.bfloat16)
    y = bh.ops.average_pool(x, window=(512,))
    assert y.dtype == jnp.bfloat16 and float(y[0, 0, 0]) == 1.0078125


@pytest.mark.parametrize("name", ["max_pool", "average_pool"])
@pytest.mark.parametrize(
    "how", [{"window": (2, 2)}, {"window": (3, 3), "stride": (2, 2), "padding": "SAME"}], ids=repr
)
def test_no_more_memory_than_autodiff(name, how):
    op, x = getattr(bh.ops, name), normal(0, 4, 16, 16, 32)
    ours, theirs = (
        temporary_bytes(lambda x, dy, f=f: jax.vjp(lambda x: f(x, **how), x)[1](dy), x, dy)
        for f in (op, op.reference)
        for dy in [op(x, **how)]
    )
    assert ours <= theirs
