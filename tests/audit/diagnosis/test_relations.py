"""Each relation between a wrong gradient and the right one is told from the others."""

import numpy as np
import pytest

from backhand.audit.diagnosis import diagnose
from backhand.audit.diagnosis.pair import Context

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(3, 8, 5))
SQUARE = RNG.normal(size=(3, 6, 6))
OTHER = RNG.normal(size=(3, 8, 5))


def shifted(x):
    """Moved by one along the first axis of the leaf, zeros coming in."""
    moved = np.zeros_like(x)
    moved[:, 1:] = x[:, :-1]
    return moved


WRONG = {
    "a sign": (-TRUTH, TRUTH, "sign", "sign is flipped"),
    "1.001": (1.001 * TRUTH, TRUTH, "factor", "1.001 x"),
    "twice": (2 * TRUTH, TRUTH, "factor", "2 x too large"),
    "half": (0.5 * TRUTH, TRUTH, "factor", "2 x too small"),
    "a mean over the batch": (32 * TRUTH, TRUTH, "mean", "a mean over the batch of 32 is missing"),
    "a mean too many": (TRUTH / 5, TRUTH, "mean", "5.0 x too small"),
    "a mean over two axes": (TRUTH / 40, TRUTH, "mean", "8 x 5 elements"),
    "the root of a length": (8**0.5 * TRUTH, TRUTH, "mean", "the root of the 8"),
    "a mean and a sign": (-32 * TRUTH, TRUTH, "mean", "and its sign is flipped"),
    "nothing": (0 * TRUTH, TRUTH, "zero", "the path through `w` is missing"),
    "something for nothing": (TRUTH, 0 * TRUTH, "spurious", "where the true gradient is zero"),
    "constant in dy": (TRUTH[:1] + 0 * TRUTH, TRUTH, "dy ignored", "dy is not used"),
    "another call's dy": (np.roll(TRUTH, 1, 0), TRUTH, "stale", "dy of another call"),
    "transposed": (SQUARE.swapaxes(1, 2), SQUARE, "transposed", "transposed"),
    "reversed": (TRUTH[:, :, ::-1], TRUTH, "reversed", "back to front along axis 1"),
    "rolled": (np.roll(TRUTH, 2, 1), TRUTH, "rolled", "off by +2 along axis 0"),
    "shifted": (shifted(TRUTH), TRUTH, "rolled", "off by +1 along axis 0"),
    "permuted": (TRUTH[:, [1, 3, 0, 2, 4, 6, 7, 5]], TRUTH, "permuted", "1, 3, 0, 2, 4"),
    "broadcast": (
        TRUTH.sum(1, keepdims=True) + 0 * TRUTH,
        TRUTH,
        "broadcast",
        "the sum of the true gradient",
    ),
    "a constant": (TRUTH + 0.1, TRUTH, "offset", "a constant 0.1"),
    "a term without dy": (TRUTH + OTHER[:1], TRUTH, "offset", "does not depend on dy"),
    "centred": (
        TRUTH - TRUTH.mean(2, keepdims=True),
        TRUTH,
        "dropped",
        "the mean over axis 1 is subtracted",
    ),
    "uncentred": (TRUTH + OTHER[:, :, :1], TRUTH, "dropped", "constant along axis 1 is missing"),
    "a term of rank one": (
        SQUARE + SQUARE[:, :1] * SQUARE[:, :, 1:2],
        SQUARE,
        "dropped",
        "a term of rank 1",
    ),
    "bfloat16 on the way": (
        TRUTH * (1 + 1e-3 * RNG.normal(size=TRUTH.shape)),
        TRUTH,
        "rounded",
        "as if run in",
    ),
    "a factor a row": (TRUTH * OTHER[0, :, :1], TRUTH, "slices", "along axis 0"),
    "a factor an element": (TRUTH * OTHER[0], TRUTH, "local", "another local derivative"),
    "a factor a cotangent": (TRUTH * OTHER[:, :1, :1], TRUTH, "nonlinear", "under every cotangent"),
    "almost": (TRUTH * (1 + 0.05 * OTHER), TRUTH, "nearly", "almost right (cosine 0.99"),
    "something else": (OTHER, TRUTH, "unknown", "no simple relation: cosine"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_relation_is_named(name):
    ours, truth, kind, text = WRONG[name]
    cause = diagnose(ours, truth, context=Context(batch=32), path="w")
    assert cause is not None
    assert cause.kind == kind
    assert text in cause.message


@pytest.mark.parametrize("name", WRONG)
def test_a_relation_is_named_in_float32_too(name):
    ours, truth, kind, _ = WRONG[name]
    noisy = ours + 2e-7 * np.abs(ours).max() * RNG.normal(size=ours.shape)
    if kind == "zero":
        noisy = ours
    cause = diagnose(noisy, truth, context=Context(batch=32, noise=2e-6), path="w")
    assert cause is not None
    assert cause.kind == kind


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_was_rounded_at_the_end_is_recognised(dtype):
    cause = diagnose(TRUTH.astype(dtype).astype(np.float64), TRUTH)
    assert cause is not None
    assert cause.message == f"rounded to {dtype}: every element is a {dtype}"


def test_a_factor_of_dy_is_no_local_derivative_where_elements_depend_on_each_other():
    dy, s = RNG.normal(size=(3, 8, 5)), RNG.uniform(0.5, 1.5, size=(8, 5))
    right = s * (dy - (dy * s).sum(2, keepdims=True))
    cause = diagnose(s * dy, right, context=Context(errors={"y": dy}))
    assert (cause.kind, "what other elements send is missing" in cause.message) == ("local", True)


def test_another_shape_or_dtype_comes_before_all_else():
    assert diagnose(TRUTH[:, :, :3], TRUTH).kind == "shape"
    assert diagnose(TRUTH, TRUTH, context=Context(dtypes=("float16", "float32"))).kind == "dtype"


def test_swapped_arguments_are_told_from_a_sign():
    exchanged = diagnose(-TRUTH, TRUTH, {"v": (TRUTH, -TRUTH)})
    assert (exchanged.kind, exchanged.message) == (
        "swapped",
        "this and the gradient of `v` are swapped",
    )
    assert diagnose(-TRUTH, TRUTH, {"v": (-TRUTH, -TRUTH)}).kind == "sign"
    assert diagnose(OTHER, TRUTH, {"v": (0 * OTHER, OTHER)}).kind == "swapped"
