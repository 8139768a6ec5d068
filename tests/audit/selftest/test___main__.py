"""The self-test as a command."""

import json

import pytest

from backhand.audit.gradient import Verdict
from backhand.audit.selftest.__main__ import main


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


def test_a_pattern_without_rows_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "no such row"])
    assert "no row of the catalogue matches" in capsys.readouterr().err


def test_no_process_at_all_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--processes", "0"])
    assert "needs at least 1, got 0" in capsys.readouterr().err
