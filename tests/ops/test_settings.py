"""Settings: one for all axes or one for each, of any kind of integer, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from backhand.ops.settings import integer, pads, pairs, per_axis


def test_one_number_is_for_every_axis_and_numpy_integers_are_integers(unchecked):
    assert per_axis("conv", "stride", 2, 3) == (2, 2, 2)
    assert per_axis("conv", "stride", np.array(2), 2) == (2, 2)
    for several in ((np.int64(2), 1), [2, 1], np.array([2, 1]), jnp.array([2, 1])):
        assert per_axis("conv", "stride", several, 2) == (2, 1)
    assert pairs("conv", np.array([[1, 0]]), 1, ("SAME",)) == ((1, 0),)
    assert integer("norm", "groups", np.int32(3)) == 3


def test_a_padding_is_known_where_it_has_a_name():
    given = (5,), (2,), (3,)
    assert pads("conv", "SAME", *given, ("SAME",)) == ((1, 1),)
    assert pads("conv", "SAME", (6,), (2,), (3,), ("SAME",)) == ((0, 1),)
    assert pads("conv", "CAUSAL", *given, ("CAUSAL",)) == ((2, 0),)
    assert pads("conv", "VALID", *given, ("VALID",)) == ((0, 0),)
    with pytest.raises(ValueError, match=r"padding 'SAME', 'VALID', or .* got 'CAUSAL'"):
        pads("pool", "CAUSAL", *given, ("SAME", "VALID"))


def test_what_is_no_integer_or_too_small_is_refused(unchecked):
    for wrong in (True, 2.0, "2", None, np.array([2.0]), jnp.ones(1)):
        with pytest.raises(TypeError, match="norm needs groups of integers, got"):
            integer("norm", "groups", wrong)
    with pytest.raises(ValueError, match="norm needs groups of at least 1, got 0"):
        integer("norm", "groups", 0)
    with pytest.raises(ValueError, match=r"stride as one integer or 3, .* got \[1 2\]"):
        per_axis("conv", "stride", np.array([1, 2]), 3)
