"""From a target to the arguments of `bh.compare` and `bh.check`."""

import sys

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.audit import Audit, Report
from backhand.catalogue import ROWS, Row
from backhand.cli.subjects import of_check, of_compare
from backhand.cli.targets import BadUsage


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, dy: (3 * x**2 * dy,))
REPORT = Report((), ("manual", "automatic"), (0.0, 0.0), 0.0)
AUDIT = Audit("made", (), ())
LAYER = bh.dense(3)
OBJECTIVE = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
TWICE = bh.Op("twice", lambda x: (2 * x, ()), lambda r, dy: 2 * dy, lambda x: 2 * x)
NUMBER = 3


def pair():
    return cube, jnp.power, jnp.ones(3)


def report():
    return REPORT


def audit():
    return AUDIT


def one_argument(x):
    return x


def optional(x=1.0):
    return x


def several(*xs):
    return xs[0]


def a_list():
    return [cube, cube]


def nothing():
    pass


def a_row():
    return ROWS[0]


def make_layer():
    return bh.dense(3)


def with_arguments():
    return cube, jnp.ones(3)


def raising():
    raise RuntimeError("no data\nfound")


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This module by its own name, however pytest imported it."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[HERE])


def test_compare_takes_a_tuple_or_the_report():
    assert of_compare(f"{HERE}:pair")[:2] == (cube, jnp.power)
    assert of_compare(f"{HERE}:report") is REPORT
    assert of_compare(f"{HERE}:audit") is AUDIT


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NUMBER", "is an int; name a function without required arguments"),
        ("OBJECTIVE", "is an Objective; name a function"),
        ("LAYER", "is a Layer; name a function"),
        ("one_argument", "needs x; name a function without required arguments"),
        ("a_list", "returned a list; it must return .* as a tuple, or the report"),
        ("nothing", "returned None"),
        ("raising", r"raised RuntimeError: no data$"),
    ],
)
def test_what_cannot_be_compared_is_refused(name, said):
    with pytest.raises(BadUsage, match=said) as caught:
        of_compare(f"{HERE}:{name}")
    assert str(caught.value).startswith(f"{HERE}:{name}")
    assert "\n" not in str(caught.value)


def test_a_row_of_the_catalogue_is_found_by_its_name_its_description_and_its_op():
    linear = [row for row in ROWS if row.name == "ops.linear"]
    assert of_check("ops.linear") == [(row,) for row in linear]
    assert of_check(repr(ROWS[-1])) == [(ROWS[-1],)]
    assert of_check("backhand.ops:linear") == [(row,) for row in linear]
    assert of_check("backhand:relu") == [(row,) for row in ROWS if row.name == "layers.relu"]
    ((row,),) = of_check(f"{HERE}:a_row")
    assert row is ROWS[0]


def test_a_function_is_given_random_arrays():
    ((subject, x),) = of_check(f"{HERE}:cube", ["f32[2,3]"])
    assert subject is cube
    assert x.shape == (2, 3)
    ((subject, x),) = of_check(f"{HERE}:several", ["f32[2]"])
    assert subject is several
    ((subject, x),) = of_check(f"{HERE}:optional", ["f32[2]"])
    assert subject is optional
    ((subject, *given),) = of_check("backhand.ops:linear", ["f32[2,3]", "f32[3,4]"])
    assert subject is bh.ops.linear
    assert [x.shape for x in given] == [(2, 3), (3, 4)]


@pytest.mark.parametrize("name", ["LAYER", "make_layer"])
def test_a_layer_is_given_parameters_for_its_input(name):
    ((layer, params, x),) = of_check(f"{HERE}:{name}", ["f32[2,5]"])
    assert isinstance(layer, bh.Layer)
    assert params["w"].shape == (5, 3)
    assert x.shape == (2, 5)


def test_a_function_without_arguments_gives_them_itself():
    ((subject, x),) = of_check(f"{HERE}:with_arguments")
    assert subject is cube
    assert x.shape == (3,)
    assert of_check(f"{HERE}:audit") == [AUDIT]


@pytest.mark.parametrize(
    ("target", "texts", "said"),
    [
        ("ops.liner", [], "the catalogue has no row 'ops.liner'; did you mean 'ops.linear'"),
        ("ops.linear", ["f32[2]"], r"leave --arg out, .* as in backhand\.ops:linear"),
        (f"{HERE}:NUMBER", [], "is an int; name an op, a layer, or a function"),
        (f"{HERE}:cube", [], r"takes x; give an --arg for each, as in --arg 'f32\[4,8\]'"),
        (f"{HERE}:LAYER", [], "is a layer; give its input"),
        (f"{HERE}:LAYER", ["f32[2,3]", "f32[2]"], "is a layer of one input; .* got 2"),
        (f"{HERE}:OBJECTIVE", [], r"is an objective; name .* \(objective, params, batch\)"),
        (f"{HERE}:make_layer", [], "is a layer; give its input"),
        (f"{HERE}:a_list", [], "returned a list; it must return .subject, "),
        (f"{HERE}:optional", [], "returned a float; it must return"),
        (f"{HERE}:with_arguments", ["f32[2]"], "returned a tuple, to which no --arg"),
        (f"{HERE}:nothing", [], "returned None"),
        (f"{HERE}:pair", [], "returned what bh.compare takes: use `backhand compare "),
        (f"{HERE}:cube", ["f32"], "is no dtype and shape"),
    ],
)
def test_what_cannot_be_checked_is_refused(target, texts, said):
    with pytest.raises(BadUsage, match=said) as caught:
        of_check(target, texts)
    assert "\n" not in str(caught.value)


def test_an_op_that_is_in_no_catalogue_needs_arguments():
    with pytest.raises(BadUsage, match="TWICE takes x; give an --arg"):
        of_check(f"{HERE}:TWICE")
    assert isinstance(of_check("ops.relu")[0][0], Row)
