"""The audit's record: what is wrong first, plain values for JSON, lines that fit a terminal."""

import json

import numpy as np
import pytest

from backhand.audit import Audit, Cause, Cost, Finding, Leaf, Side
from backhand.audit.result import plain, sized

CAUSE = Cause("mean", "32.0 x too large: a mean over the batch of 32 is missing")


def leaf(path="w", agrees=True, **changes):
    zeros = np.zeros((3, 4, 2))
    values = {
        "path": path,
        "shape": (4, 2),
        "dtype": "float32",
        "ours": zeros,
        "truth": zeros.copy(),
        "difference": 1e-9,
        "relative": 2e-9,
        "where": (1, 0),
        "agrees": agrees,
        "errors": {"float32": (1e-7, 2e-7), "bfloat16": (1e-3, 2e-3)},
        "cause": None if agrees else CAUSE,
    }
    return Leaf(**{**values, **changes})


RIGHT = Finding("gradient", "w", True, "right in float64")
WRONG = Finding("gradient", "b", False, "the gradient is wrong", CAUSE)
SKIPPED = Finding("vmap", "", True, "it cannot be tried", skipped=True)
COST = Cost(
    Side(1.0, 2048, 100.0, {"x": 512, "mean": 8}), Side(2.0, None, None, {"float32[4,2]": 1040})
)


def test_an_audit_passes_if_every_finding_did():
    good = Audit("f", (leaf(),), (RIGHT, SKIPPED))
    assert good.passed
    good.assert_passed()
    assert good.failures == ()
    bad = Audit("f", (leaf(),), (RIGHT, WRONG))
    assert not bad.passed
    assert bad.failures == (WRONG,)
    with pytest.raises(AssertionError, match=r"(?s)f: FAILED.*a mean over the batch of 32"):
        bad.assert_passed()


def test_what_is_wrong_comes_first_with_its_cause_and_what_is_skipped_says_why():
    audit = Audit("f", (leaf(), leaf("b", False)), (RIGHT, WRONG, SKIPPED), COST)
    lines = str(audit).splitlines()
    assert lines[0] == "f: FAILED in 1 of 2 checks"
    assert lines[1].split()[:2] == ["WRONG", "b:"]
    assert "a mean over the batch of 32 is missing" in " ".join(lines[1:3])
    assert any(line.endswith("DIFFERS") for line in lines)
    assert "skipped: vmap: it cannot be tried" in lines
    assert any("2 KiB temporary" in line and "x 512 B, mean 8 B" in line for line in lines)


def test_what_the_errors_leave_out_is_counted():
    truth = np.zeros((3, 4, 2))
    truth[1, 0, :] = truth[2, 3, 0] = np.nan
    audit = Audit("f", (leaf(truth=truth), leaf("b")), (RIGHT,))
    said = "w: the truth is not finite at 3 of 8 elements, which its errors leave out"
    assert [line.strip() for line in str(audit).splitlines() if "finite" in line] == [said]
    assert said in audit._repr_html_()


@pytest.mark.parametrize("depth", [1, 40])
def test_no_line_is_longer_than_100_columns(depth):
    path = "/".join(["block"] * depth) + "/w"
    wide = leaf(path, False, shape=(1024, 4096, 12), difference=float("inf"))
    audit = Audit("f" * 20 * depth, (wide, leaf()), (WRONG, RIGHT), COST)
    assert max(map(len, str(audit).splitlines())) <= 100


def test_plain_values_survive_json_without_the_elements():
    audit = Audit("f", (leaf(relative=float("inf")), leaf("b", False)), (WRONG, SKIPPED), COST)
    values = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert (values["name"], values["passed"]) == ("f", False)
    first, second = values["leaves"]
    assert "ours" not in first and "truth" not in first
    assert first["relative"] == "inf"
    assert first["errors"]["float32"] == [1e-7, 2e-7]
    assert second["cause"] == {"kind": "mean", "message": CAUSE.message}
    assert values["findings"][1]["skipped"] is True
    assert values["cost"]["manual"]["residual_bytes"] == {"x": 512, "mean": 8}
    assert Audit("f", (), ()).to_dict()["cost"] is None


def test_ratios_are_manual_over_automatic():
    costs = Audit("f", (), (RIGHT,), COST).to_dict()["cost"]
    ratios = {name: costs[name] for name in ("time_ratio", "residual_ratio", "flops_ratio")}
    assert ratios == {"time_ratio": 0.5, "residual_ratio": 0.5, "flops_ratio": None}
    assert COST.time_ratio == 0.5
    assert COST.residual_ratio == 0.5
    assert COST.flops_ratio is None
    assert Cost(COST.manual, Side(1.0, None, 50.0, {})).residual_ratio is None
    assert Cost(COST.manual, Side(1.0, None, 50.0, {})).flops_ratio == 2


def test_numpy_scalars_become_python_numbers():
    values = plain({"a": np.float64(1.5), "b": (np.int64(2), float("nan"))})
    assert values == {"a": 1.5, "b": [2, "nan"]}
    assert type(values["b"][0]) is int


def test_sizes_are_read_in_the_largest_unit_that_fits():
    assert [sized(n) for n in (12, 1536, 3 << 20, 5 << 40)] == [
        "12 B",
        "1.5 KiB",
        "3 MiB",
        "5120 GiB",
    ]
