"""A bug that is the same mistake in other inputs is found by making that mistake on purpose."""

import dataclasses

import numpy as np
import pytest

from backhand.audit.diagnosis import diagnose
from backhand.audit.diagnosis.pair import Context
from backhand.audit.result import Cause

RNG = np.random.default_rng(0)
INPUTS = {
    "x": RNG.normal(size=(6, 4)),
    "w": RNG.normal(size=(4, 3)),
    "scale": RNG.normal(size=(3,)),
}
ERRORS = {"y": RNG.normal(size=(3, 6, 3)), "z": RNG.normal(size=(3, 6, 4))}


def vjp(inputs, errors):
    """Of y = (x w) scale and z = x."""
    dy = errors["y"] * inputs["scale"]
    dx = np.einsum("sbo,io->sbi", dy, inputs["w"]) + errors["z"]
    return {"x": dx, "w": np.einsum("bi,sbo->sio", inputs["x"], dy)}


def without_scale(inputs, errors):
    return vjp({**inputs, "scale": np.full(3, 0.5)}, errors)


CONTEXT = Context(
    batch=6, inputs=INPUTS, errors=ERRORS, vjp=vjp, alternatives={"eps": without_scale}
)
TRUTH = vjp(INPUTS, ERRORS)


def changed(inputs=None, errors=None):
    """What the right pass gives on other inputs or errors."""
    return vjp({**INPUTS, **(inputs or {})}, {**ERRORS, **(errors or {})})


def test_a_right_gradient_has_no_cause():
    assert diagnose(TRUTH["x"], TRUTH["x"], context=CONTEXT, path="x") is None


@pytest.mark.parametrize(
    ("path", "wrong", "kind", "text"),
    [
        (
            "x",
            changed(errors={name: np.roll(e, 1, 1) for name, e in ERRORS.items()}),
            "rolled",
            "off by +1 along axis 0",
        ),
        (
            "w",
            changed(errors={name: np.roll(e, 1, 1) for name, e in ERRORS.items()}),
            "another error",
            "dy of the example before",
        ),
        (
            "w",
            changed(errors={"y": ERRORS["y"] * (np.arange(6) < 5)[:, None]}),
            "left out",
            "the last example is left out",
        ),
        ("w", changed(errors={"y": ERRORS["y"] ** 2}), "nonlinear", "its square comes back"),
        ("x", changed(errors={"y": 0 * ERRORS["y"]}), "output ignored", "the output `y`"),
        ("x", changed(errors={"z": 0 * ERRORS["z"]}), "identity", "dy of `z` is missing"),
        ("x", changed({"scale": np.ones(3)}), "input ignored", "the factor `scale` is taken as 1"),
        ("x", without_scale(INPUTS, ERRORS), "setting", "with `eps`"),
    ],
)
def test_a_mistake_in_what_comes_in_is_named(path, wrong, kind, text):
    cause = diagnose(wrong[path], TRUTH[path], context=CONTEXT, path=path)
    assert cause.kind == kind
    assert text in cause.message


def test_an_input_that_is_off_by_one_between_its_axes_is_another_padding():
    x, dy = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(3, 2, 5, 4))

    def of_weights(inputs, errors):
        return {"w": np.einsum("bti,sbto->sio", inputs["x"], errors["y"])}

    context = Context(batch=2, inputs={"x": x}, errors={"y": dy}, vjp=of_weights)
    moved = np.concatenate([0 * x[:, :1], x[:, :-1]], 1)
    wrong, right = of_weights({"x": moved}, {"y": dy})["w"], of_weights({"x": x}, {"y": dy})["w"]
    cause = diagnose(wrong, right, context=context, path="w")
    assert cause.kind == "padding"
    assert "`x` off by +1 along its axis 1: another padding" in cause.message


def test_of_mistakes_on_one_path_the_sum_is_named_then_what_names_an_argument():
    def without_scale(inputs, errors):
        return vjp({**inputs, "scale": np.array([1.0, 0.0, 2.0])}, errors)

    wrong = without_scale(INPUTS, ERRORS)["x"]
    path, named, sums = (
        Cause(*pair) for pair in (("path", "`tanh`"), ("path", "`w`"), ("sum", ""))
    )
    for known, expected in [((path, named, sums), sums), ((path, named), named), ((path,), path)]:
        ways = [(Cause("path", "another"), vjp), *((cause, without_scale) for cause in known)]
        made = [(cause, way(INPUTS, ERRORS), way) for cause, way in ways]
        context = dataclasses.replace(CONTEXT, mistakes=lambda made=made: made)
        assert diagnose(wrong, TRUTH["x"], context=context, path="x") == expected


def test_a_sum_over_the_wrong_axis_is_named():
    x, dy = RNG.normal(size=(5, 5)), RNG.normal(size=(3, 5, 5))
    context = Context(
        inputs={"x": x}, errors={"y": dy}, vjp=lambda i, e: {"b": e["y"].sum(1), "s": None}
    )
    bias = diagnose(dy.sum(2), dy.sum(1), context=context, path="b")
    assert bias.message == "dy of `y` is summed over axis 1, and should be over 0"
    scale = diagnose((dy * x).sum(2), (dy * x).sum(1), context=context, path="s")
    assert scale.message == "dy of `y` times `x` is summed over axis 1, and should be over 0"


def test_a_weight_that_is_transposed_is_named():
    w, dy = RNG.normal(size=(4, 4)), RNG.normal(size=(3, 6, 4))
    context = Context(inputs={"w": w}, errors={"y": dy}, vjp=lambda i, e: {"x": e["y"] @ i["w"].T})
    cause = diagnose(dy @ w, dy @ w.T, context=context, path="x")
    assert (cause.kind, cause.message) == ("transposed", "the gradient with `w` transposed")


def test_stale_residuals_are_named():
    inputs = {"x": INPUTS["x"] ** 2, "w": INPUTS["w"]}

    def squares(inputs, errors):
        return {"x": 2 * inputs["x"] * errors["z"]}

    context = Context(batch=6, inputs=inputs, errors=ERRORS, vjp=squares)
    stale = squares({"x": np.roll(inputs["x"], 1, 0)}, ERRORS)
    cause = diagnose(stale["x"], squares(inputs, ERRORS)["x"], context=context, path="x")
    assert cause.kind == "another example"
    assert "`x` of the example before" in cause.message
