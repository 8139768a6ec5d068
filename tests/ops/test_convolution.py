"""Convolution against its meaning, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal

convolution = bh.ops.convolution


def problem(index):
    """Shapes and settings, of each kind some: one to three axes, any padding, groups, depthwise."""
    random, rank = np.random.default_rng(index), 1 + index % 3

    def several(low, high):
        return tuple(int(n) for n in random.integers(low, high + 1, rank))

    kernel, stride, dilation = several(1, (4, 3, 2)[rank - 1]), several(1, 3), several(1, 2)
    kinds = ["SAME", "VALID", "pairs", *(["CAUSAL"] if rank == 1 else [])]
    padding = kinds[index // 3 % len(kinds)]
    if padding == "pairs":
        padding = tuple(zip(several(0, 3), several(0, 3), strict=True))
    groups, own, outputs = (int(n) for n in random.integers(1, 4, 3))
    if index % 4 == 0:
        own = 1
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = tuple(max(n, r) for n, r in zip(several(1, 6), reach, strict=True))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return sizes, (*kernel, own, groups * outputs), how


@settings(max_examples=200)
@given(st.integers(0, 39), st.integers(0, 3), st.integers(0, 1000))
def test_any_setting_has_the_gradient_of_the_textbook_form(index, batch, seed):
    sizes, weights, how = problem(index)
    random = np.random.default_rng(seed)
    x = random.standard_normal((1 + batch % 2, *sizes, how["groups"] * weights[-2]))
    assert_is_its_reference(convolution, (x, random.standard_normal(weights)), seed, **how)


def test_a_point_is_seen_by_every_window_that_it_is_in(x64):
    """The weight, turned round."""
    w = normal(0, 3, 3, 1, 1)
    point = jnp.zeros((1, 7, 7, 1)).at[0, 3, 3, 0].set(1)
    y = convolution(point, w)[0, 2:5, 2:5, 0]
    assert_close(y, jnp.flip(w, (0, 1))[:, :, 0, 0])


def test_an_input_that_no_window_sees_gets_no_blame():
    x, w = normal(0, 1, 7, 2), normal(1, 1, 2, 3)
    blame = jax.grad(lambda x: convolution(x, w, stride=3, padding="VALID").sum())(x)
    assert blame.any((0, 2)).tolist() == [True, False, False] * 2 + [True]


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_future_gets_no_blame_from_the_past(dilation):
    x, w = normal(0, 1, 8, 2), normal(1, 3, 2, 3)
    blame = jax.grad(lambda x: convolution(x, w, padding="CAUSAL", dilation=dilation)[:, 5].sum())(
        x
    )
    seen = [t in {5 - dilation * k for k in range(3)} for t in range(8)]
    assert blame.any((0, 2)).tolist() == seen


def test_a_group_gets_no_blame_from_another():
    x, w = normal(0, 2, 5, 5, 6), normal(1, 3, 3, 2, 9)
    blame = jax.grad(lambda x: convolution(x, w, groups=3)[..., 3:6].sum())(x)
    assert blame.any((0, 1, 2)).tolist() == [False, False, True, True, False, False]


def test_a_kernel_of_one_is_a_linear_map(x64):
    x, w = normal(0, 2, 5, 4, 3), normal(1, 1, 1, 3, 6)
    assert_close(convolution(x, w), bh.ops.linear(x, w[0, 0]))


def test_low_precision_sums_the_weights_gradient_in_float32():
    """Over 16,384 places of one sign, which bfloat16 cannot count beyond 256."""
    x, w = jnp.ones((4, 64, 64, 2), jnp.bfloat16), jnp.zeros((1, 1, 2, 2))
    y, residuals = convolution.forward(x, w)
    dx, dw = convolution.backward(residuals, jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert (dw == 16384).all()


def shape(*axes, dtype="float32"):
    return jax.ShapeDtypeStruct(axes, dtype)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": shape(8, 8, 3)}, ValueError, r"2 spatial axes .* its batch axis: .* x\[None\]"),
        ({"w": shape(3, 3, 4)}, ValueError, r"with 2 axes for the taps and two .* \(3, 3, 4\)"),
        ({"x": shape(8, 3)}, ValueError, r"1, 2 or 3 spatial axes, got \(8, 3\); a single example"),
        ({"x": shape(1, 2, 2, 2, 2, 3)}, ValueError, "1, 2 or 3 spatial axes"),
        ({"x": shape(2, 8, 8, 3, dtype="int32")}, TypeError, "floating-point input, got int32"),
        ({"w": shape(3, 3, 3, 4, dtype="int32")}, TypeError, "floating-point w, got int32"),
        ({"w": shape(3, 3, 2, 4)}, ValueError, r"I / groups = 3 for x \(2, 8, 8, 3\) .* \(3, 3, 2"),
        ({"w": shape(0, 3, 3, 4)}, ValueError, r"none of length 0, .* got \(0, 3, 3, 4\)"),
        ({"groups": 2}, ValueError, r"channels divisible by groups = 2, got 3 in x .* and 4"),
        ({"groups": 3}, ValueError, "channels divisible by groups = 3, got 3 in x .* and 4"),
        ({"w": shape(9, 3, 3, 4), "padding": "VALID"}, ValueError, "at least as large as its win"),
        ({"padding": "CAUSAL"}, ValueError, "one spatial axis for padding 'CAUSAL', got 2"),
        ({"stride": (1, 0)}, ValueError, r"stride of at least 1, got \(1, 0\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed, error, message, unchecked, nothing_compiles):
    given = {"x": shape(2, 8, 8, 3), "w": shape(3, 3, 3, 4), **changed}
    arrays = given.pop("x"), given.pop("w")
    with nothing_compiles(), pytest.raises(error, match=f"convolution needs .*{message}"):
        jax.eval_shape(lambda x, w: convolution(x, w, **given), *arrays)


def test_settings_may_be_numpy_integers(unchecked):
    x, w = normal(0, 2, 7, 4), normal(1, 3, 2, 4)
    y = convolution(x, w, stride=np.int64(2), groups=np.int32(2))
    assert_close(y, convolution.reference(x, w, stride=2, groups=2), 1e-6)
