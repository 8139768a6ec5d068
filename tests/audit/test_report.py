"""The report: a verdict, a table that fits a terminal, plain values for JSON."""

import json

import numpy as np
import pytest

from backhand.audit import Report, Row


def row(path="hidden/w", agrees=True, **changes):
    values = {
        "path": path,
        "shape": (3, 4),
        "dtype": "float32",
        "difference": 1.5e-8,
        "relative": 2.5e-8,
        "where": (1, 2),
        "cosine": 1.0,
        "norm_ratio": 1.0,
        "agrees": agrees,
    }
    return Row(**{**values, **changes})


def report(*rows, values=(1.0, 1.0)):
    return Report(rows, ("manual", "automatic"), values, 5e-5)


def test_the_verdict_says_how_far_apart_the_worst_leaf_is():
    good = report(row(), row("out/b", relative=3e-6, shape=()))
    assert good.agrees
    good.assert_close()
    assert str(good).splitlines()[-1] == (
        "manual and automatic gradients agree in all 2 leaves: "
        "relative difference 3.0e-06, tolerance 5.0e-05"
    )
    bad = report(row(), row("out/b", agrees=False))
    assert not bad.agrees
    assert str(bad).splitlines()[-1].endswith("DIFFER in 1 of 2 leaves")


def test_losses_are_part_of_the_verdict():
    apart = report(row(), values=(1.0, 1.001))
    assert (apart.agrees, apart.values_agree) == (False, False)
    with pytest.raises(AssertionError, match="the values DIFFER"):
        apart.assert_close()
    assert not report(row(), values=(float("nan"), 1.0)).agrees
    assert report(row(), values=(1.0, 1.0 + 1e-6)).agrees


def test_a_note_is_printed_under_the_table_and_leaves_the_worst_to_others():
    text = str(report(row(relative=2.0, note="rounding: in float64 ..."), row("out/b")))
    assert "hidden/w: rounding: in float64 ..." in text
    assert "relative difference 2.5e-08" in text


@pytest.mark.parametrize("names", [3, 60])
def test_the_table_has_at_most_100_columns(names):
    path = "/".join(f"block{i}" for i in range(names)) + "/attention/query/w"
    wide = report(
        row(path, shape=(16, 512, 512), where=(15, 511, 511), dtype="bfloat16"),
        row(path + "/b", difference=float("inf"), norm_ratio=float("inf"), agrees=False),
        row("x"),
    )
    lines = str(wide).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["leaf", "shape", "dtype"]
    assert set(lines[1]) == {"-", " "}
    assert "/query/w" in lines[2]
    assert lines[3].endswith("DIFFERS")


def test_plain_values_survive_json():
    rows = row(), row("b", shape=(), where=(), norm_ratio=float("inf"), note="NaN", agrees=False)
    plain = json.loads(json.dumps(report(*rows).to_dict()))
    assert (plain["agrees"], plain["tolerance"]) == (False, 5e-5)
    assert plain["values"] == {"manual": 1.0, "automatic": 1.0}
    assert plain["rows"][0]["shape"] == [3, 4]
    assert plain["rows"][1]["note"] == "NaN"


def test_a_report_of_no_leaves_agrees():
    empty = report()
    assert empty.agrees
    assert "agree in all 0 leaves" in str(empty)
    assert np.isfinite(empty.tolerance)
