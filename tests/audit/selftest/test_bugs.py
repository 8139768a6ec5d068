"""Each kind of bug does what its name says, in NumPy's and in JAX's arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backhand.audit.diagnosis import KINDS
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.plants import Site

X = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
DY = np.random.default_rng(2).normal(size=(5, 3, 3)).astype(np.float32)
ARGUMENTS = (X, {"w": W, "v": W + 1}, np.arange(3))
IN_A_LEAF = [kind for kind, bug in BUGS.items() if not bug.whole and kind != "swapped arguments"]


def right(arguments, residuals, dy):
    """A pass whose cotangents are easily told apart."""
    _, params, _ = arguments
    scale = residuals["scale"][:, None, None] * residuals["gain"]
    return dy * scale, {"v": params["v"] * dy.sum(), "w": params["w"] * dy.sum() / 2}, None


RESIDUALS = {"gain": np.float32(3), "scale": np.arange(1, 6, dtype=np.float32)}
OTHER = {"gain": np.float32(2), "scale": np.ones(5, np.float32)}


def site(place=(0, 0), **given):
    return Site(place, **{"twin": None, "batch": 5, "other": OTHER, "dys": (DY, -DY), **given})


def wrong(kind, at, dy=DY, arguments=ARGUMENTS):
    """What the pass gives with a bug."""
    return BUGS[kind].plant(right, at)(arguments, RESIDUALS, dy)


def leaf(kind, **given):
    """What becomes of the first leaf."""
    return np.asarray(wrong(kind, site(**given))[0], np.float64)


TRUE = np.asarray(right(ARGUMENTS, RESIDUALS, DY)[0], np.float64)


def test_there_are_many_kinds_each_with_a_cause_that_the_diagnosis_knows():
    assert len(BUGS) >= 30
    assert set().union(*(bug.causes for bug in BUGS.values())) <= KINDS.keys() | {"structure"}


@pytest.mark.parametrize("kind", IN_A_LEAF)
def test_a_bug_in_a_leaf_leaves_the_others_alone(kind):
    _, params, ids = wrong(kind, site())
    _, expected, _ = right(ARGUMENTS, RESIDUALS, DY)
    assert ids is None
    for name in expected:
        np.testing.assert_array_equal(params[name], expected[name])


@pytest.mark.parametrize("kind", BUGS)
def test_a_bug_is_the_same_in_both_array_libraries(kind):
    at = site((1, 0), twin=(1, 1), defaults=right, mistaken=lambda kind: right)
    with np.errstate(invalid="ignore"):
        expected = wrong(kind, at)
        arguments, dy = jax.tree.map(jnp.asarray, (ARGUMENTS, DY))
        got = BUGS[kind].plant(right, at)(arguments, jax.tree.map(jnp.asarray, RESIDUALS), dy)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sign", -TRUE),
        ("factor 1.001", 1.001 * TRUE),
        ("missing mean", 5 * TRUE),
        ("mean too many", TRUE / 3),
        ("transposed", TRUE.swapaxes(1, 2)),
        ("off by one", np.roll(TRUE, 1, 0)),
        ("missing path", 0 * TRUE),
        ("way around forgotten", TRUE - DY),
        ("ragged block", TRUE * (np.arange(5) < 4)[:, None, None]),
        ("odd lengths only", TRUE * (np.arange(5) < 4)[:, None, None]),
        ("dy of another example", np.roll(DY, 1, 0) * TRUE / DY),
        (
            "residuals of another example",
            TRUE * np.array([5, 0.5, 2 / 3, 0.75, 0.8])[:, None, None],
        ),
        ("residuals of another batch", 2.0 * DY),
        ("a residual lost", 0 * TRUE),
        ("dy taken as 1", TRUE / DY),
    ],
)
def test_a_bug_does_what_its_name_says(kind, expected):
    np.testing.assert_allclose(leaf(kind), expected, rtol=1e-5, atol=1e-5)


def test_one_element_is_off_by_what_its_dtype_can_see():
    ratio = leaf("one element") / TRUE
    assert np.sum(ratio != 1) == 1
    assert ratio.max() == pytest.approx(1.001, rel=1e-5)


def test_odd_lengths_alone_are_wrong():
    x = X[:4]
    residuals = {**RESIDUALS, "scale": RESIDUALS["scale"][:4]}
    plant = BUGS["odd lengths only"].plant(right, site())
    even = plant((x, *ARGUMENTS[1:]), residuals, DY[:4])[0]
    np.testing.assert_array_equal(even, right((x, *ARGUMENTS[1:]), residuals, DY[:4])[0])


def test_swapped_arguments_have_each_others_cotangents():
    params = wrong("swapped arguments", site((1, 0), twin=(1, 1)))[1]
    expected = right(ARGUMENTS, RESIDUALS, DY)[1]
    np.testing.assert_array_equal(params["v"], expected["w"])
    np.testing.assert_array_equal(params["w"], expected["v"])


def test_integers_may_be_given_a_cotangent_and_numbers_none():
    assert wrong("cotangent of integers", site())[2].dtype == np.float32
    assert wrong("no cotangent", site())[0] is None
    assert wrong("wrong dtype", site())[0].dtype == jnp.bfloat16
    assert wrong("an axis of one too many", site())[0].shape == (1, 5, 3, 3)


@pytest.mark.parametrize("kind", [kind for kind, bug in BUGS.items() if not bug.whole])
def test_a_leaf_without_a_cotangent_has_none_afterwards(kind):
    def frozen(arguments, residuals, dy):
        return None, *right(arguments, residuals, dy)[1:]

    at = site(twin=(1, 0))
    assert BUGS[kind].plant(frozen, at)(ARGUMENTS, RESIDUALS, DY)[0] is None


def test_a_bug_that_has_nothing_to_change_is_none():
    assert BUGS["swapped arguments"].plant(right, site()) is None
    assert BUGS["residuals of another batch"].plant(right, site(other=None)) is None
    assert BUGS["a setting ignored"].plant(right, site()) is None
    assert BUGS["one path left out"].plant(right, site()) is None
    assert BUGS["last example left out"].plant(right, site(batch=None)) is None
