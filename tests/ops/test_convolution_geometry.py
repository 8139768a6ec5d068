"""Where windows lie, against the sizes that JAX gives, and what is refused."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from backhand.ops.convolution_geometry import Geometry, geometry


@settings(max_examples=100)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["SAME", "VALID", [(1, 2)]]),
)
def test_places_and_padding_are_those_of_jax(size, kernel, stride, dilation, padding):
    reach = dilation * (kernel - 1) + 1
    if padding != "SAME" and reach > size + (3 if padding != "VALID" else 0):
        with pytest.raises(ValueError, match="conv needs an input at least as large as its window"):
            geometry("conv", (size,), (kernel,), stride, padding, dilation, 1)
        return
    windows = geometry("conv", (size,), (kernel,), stride, padding, dilation, 1)
    expected = jax.eval_shape(
        lambda x, w: lax.conv_general_dilated(
            x,
            w,
            (stride,),
            padding,
            rhs_dilation=(dilation,),
            dimension_numbers=("NHC", "HIO", "NHC"),
        ),
        jax.ShapeDtypeStruct((1, size, 1), "float32"),
        jax.ShapeDtypeStruct((kernel, 1, 1), "float32"),
    )
    assert windows.places((size,), (kernel,)) == expected.shape[1:2]
    if padding == "SAME":
        assert windows.padding == tuple(lax.padtype_to_pads((size,), (reach,), (stride,), "SAME"))


def test_a_causal_window_ends_at_its_place():
    windows = geometry("conv", (9,), (4,), 1, "CAUSAL", 2, 1)
    assert windows == Geometry((1,), ((6, 0),), (2,), 1)
    assert (windows.rank, windows.reach((4,)), windows.places((9,), (4,))) == (1, (7,), (9,))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride of at least 1, got 0"),
        ({"stride": (1, 1, 1)}, ValueError, r"stride as one integer or 2, .* got \(1, 1, 1\)"),
        ({"stride": 1.5}, TypeError, "stride of integers, got 1.5"),
        ({"dilation": (1, -1)}, ValueError, r"dilation of at least 1, got \(1, -1\)"),
        ({"groups": 0}, ValueError, "groups of at least 1, got 0"),
        ({"groups": "2"}, TypeError, "groups of integers, got '2'"),
        ({"padding": "same"}, ValueError, "padding 'SAME', 'VALID', 'CAUSAL', or .* got 'same'"),
        (
            {"padding": [(1, 1)]},
            ValueError,
            r"2 spatial axes a pair .* \[\(1, 1\), \(1, 1\)\]; got",
        ),
        ({"padding": [(1, -1), (0, 0)]}, ValueError, r"got \[\(1, -1\), \(0, 0\)\]"),
        ({"padding": 1}, ValueError, "padding .* got 1"),
        ({"padding": "CAUSAL"}, ValueError, "one spatial axis for padding 'CAUSAL', got 2"),
        (
            {"padding": "VALID", "dilation": 3},
            ValueError,
            r"axis 1 has 5 .* reaches over 7; pad it",
        ),
        ({"sizes": (7, 0)}, ValueError, "axis 1 has 0 inputs"),
    ],
)
def test_what_cannot_be_is_refused(changed, error, message, unchecked):
    good = {"sizes": (7, 5), "kernel": (3, 3), "stride": 1, "padding": "SAME", "dilation": 1}
    with pytest.raises(error, match=f"^conv needs .*({message})"):
        geometry("conv", **{**good, "groups": 1, **changed})
