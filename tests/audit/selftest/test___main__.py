"""The self-test as a command and as a function."""

import json

import pytest

from backhand import ops
from backhand.audit.gradient import Verdict
from backhand.audit.selftest import __main__ as module
from backhand.audit.selftest.__main__ import main, selftest, sizes_of
from backhand.catalogue import ROWS


def test_a_row_is_audited_at_an_even_and_an_odd_size_and_at_its_borders():
    row = next(row for row in ROWS if row.subject is ops.linear)
    even, odd, *borders = sizes_of(row)
    assert set(even.values()) == {16, 4}
    assert set(odd.values()) == {5, 7}
    assert borders == [dict(edge) for edge in row.edges]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_every_row_takes_the_sizes_that_it_is_audited_at(row):
    for sizes in sizes_of(row):
        assert module._runs(row, sizes)


def test_a_few_rows_meet_every_target(tmp_path, capsys):
    files = [tmp_path / "counts.json", tmp_path / "table.md"]
    written = ["--json", str(files[0]), "--markdown", str(files[1])]
    status = main(["--quick", "--rows", r"ops\.tanh", *written])
    assert status == 0
    counts = json.loads(files[0].read_text())
    for dtype in ("float32", "float64"):
        assert set(counts[dtype]) == {
            "planted",
            "caught",
            "leaf_named",
            "cause_named",
            "correct",
            "false_alarms",
        }
        assert counts[dtype]["caught"] == counts[dtype]["planted"] > 40
        assert counts[dtype]["false_alarms"] == 0 < counts[dtype]["correct"]
    assert counts["bh.check"] == {"correct": 1, "false_alarms": 0, "failed": []}
    assert len({row["kind"] for row in counts["kinds"]}) >= 25
    assert files[1].read_text() in capsys.readouterr().out


def test_a_verdict_that_lets_bugs_pass_is_noticed(monkeypatch, capsys):
    right = Verdict(True, 0.0, (), 1.0, 0.0)
    monkeypatch.setattr(
        "backhand.audit.selftest.outcome.verdicts_on", lambda paths, *given: [right] * len(paths)
    )
    assert main(["--quick", "--rows", r"ops\.tanh"]) == 1
    assert "bugs are caught, fewer than 99%" in capsys.readouterr().out


def test_a_verdict_that_fails_right_passes_is_noticed(monkeypatch):
    monkeypatch.setattr(
        "backhand.audit.selftest.__main__.correct", lambda trial, dtype, seed: False
    )
    row = next(row for row in ROWS if row.subject is ops.tanh)
    tally, _ = selftest([row], quick=True)
    assert any("right passes fail" in failure for failure in tally.failures)


def test_a_pattern_without_rows_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "no such row"])
    assert "no row of the catalogue matches" in capsys.readouterr().err
