"""Transposed convolution is the convolution's way back, and refuses what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal

op = bh.ops.transposed_convolution


def problem(index):
    """Shapes and settings, of each kind some: one to three axes, any padding, groups, depthwise."""
    random, rank = np.random.default_rng(index), 1 + index % 3

    def several(low, high):
        return tuple(int(n) for n in random.integers(low, high + 1, rank))

    kernel, stride, dilation = several(1, (4, 3, 2)[rank - 1]), several(1, 3), several(1, 2)
    sizes, padding = several(2, 4), ("SAME", "VALID", "pairs")[index // 3 % 3]
    if padding == "pairs":
        left = [
            (n - 1) * s + d * (k - 1)
            for n, s, d, k in zip(sizes, stride, dilation, kernel, strict=True)
        ]
        padding = tuple((min(1, n // 2), min(2, n // 2)) for n in left)
    groups, own, inputs = (int(n) for n in random.integers(1, 4, 3))
    if index % 4 == 0:
        own = 1
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return sizes, (*kernel, own, groups * inputs), how


@settings(max_examples=200)
@given(st.integers(0, 26), st.integers(0, 1000))
def test_any_setting_has_the_gradient_of_the_textbook_form(index, seed):
    sizes, weights, how = problem(index)
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, *sizes, weights[-1]))
    assert_is_its_reference(op, (x, random.standard_normal(weights)), seed, **how)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"stride": (3, 2), "dilation": 2, "groups": 3}, {"padding": "VALID"}],
    ids=str,
)
def test_forward_is_the_error_of_a_convolutions_input(settings, x64):
    y, w = normal(0, 2, 12, 8, 6), normal(1, 3, 3, 6 // settings.get("groups", 1), 9)
    seen, back = jax.vjp(lambda y: bh.ops.convolution.reference(y, w, **settings), y)
    x = normal(2, *seen.shape)
    assert_close(op(x, w, **settings), back(x)[0])


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["SAME", "VALID", [(1, 0)]]),
)
def test_sizes_are_those_of_the_reference(places, kernel, stride, dilation, padding):
    arrays = (
        jax.ShapeDtypeStruct((1, places, 2), "float32"),
        jax.ShapeDtypeStruct((kernel, 3, 2), "float32"),
    )
    left = (places - 1) * stride + dilation * (kernel - 1)
    given = {"stride": stride, "padding": padding, "dilation": dilation}
    if left < 1 and padding == [(1, 0)]:
        with pytest.raises(
            ValueError, match=r"one output left, on each axis; .* outputs of \(0,\)"
        ):
            jax.eval_shape(lambda x, w: op(x, w, **given), *arrays)
        return
    ours, theirs = (
        jax.eval_shape(lambda x, w, f=f: f(x, w, **given), *arrays) for f in (op, op.reference)
    )
    assert ours.shape == theirs.shape


def test_windows_that_do_not_overlap_give_each_input_its_own(x64):
    x, w = normal(0, 2, 3, 4), normal(1, 2, 5, 4)
    y = op(x, w, stride=2)
    assert_close(y.reshape(2, 3, 2, 5), jnp.einsum("bpi,koi->bpko", x, w))


def shape(*axes, dtype="float32"):
    return jax.ShapeDtypeStruct(axes, dtype)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": shape(8, 3)}, ValueError, r"1, 2 or 3 spatial axes, got \(8, 3\)"),
        ({"x": shape(2, 0, 8, 3)}, ValueError, r"at least one input, .* outputs of \(0, 8\)"),
        ({"x": shape(2, 8, 8, 3, dtype="int32")}, TypeError, "floating-point input, got int32"),
        (
            {"w": shape(3, 3, 4, 2)},
            ValueError,
            r"w of shape \(\*K, O / groups, I\) .* \(3, 3, 4, 2",
        ),
        ({"groups": 2}, ValueError, "I divisible by groups = 2"),
        ({"padding": "CAUSAL"}, ValueError, "padding 'SAME', 'VALID', or .* got 'CAUSAL'"),
        ({"padding": [(9, 9), (0, 0)]}, ValueError, r"one output left, .* outputs of \(-8, 10\)"),
        ({"stride": 0}, ValueError, "stride of at least 1, got 0"),
        ({"dilation": (1,)}, ValueError, r"dilation as one integer or 2, .* got \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed, error, message, unchecked, nothing_compiles):
    given = {"x": shape(2, 8, 8, 3), "w": shape(3, 3, 4, 3), **changed}
    arrays = given.pop("x"), given.pop("w")
    expected = f"transposed_convolution needs .*{message}"
    with nothing_compiles(), pytest.raises(error, match=expected):
        jax.eval_shape(lambda x, w: op(x, w, **given), *arrays)
