"""Files that a command leaves behind: whole or not at all, and refused before any work."""

import json
import math

import numpy as np
import pytest

from backhand.cli.output import check_writable, write_json, write_text
from backhand.cli.targets import BadUsage


def test_json_is_written_to_a_file_or_to_standard_output(tmp_path, capsys):
    values = {"a": 1.5, "b": (1, 2), "c": math.inf, "d": np.float32(2), "e": None}
    write_json(str(tmp_path / "a.json"), values)
    write_json("-", values)
    expected = {"a": 1.5, "b": [1, 2], "c": "inf", "d": 2.0, "e": None}
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    assert json.loads(capsys.readouterr().out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "a.html"
    write_text(str(path), "first")
    write_text(str(path), "×")
    assert path.read_text(encoding="utf-8") == "×"


def test_what_cannot_be_written_is_refused(tmp_path):
    check_writable("--json", None)
    check_writable("--json", "-")
    check_writable("--html", str(tmp_path / "new.html"))
    with pytest.raises(BadUsage, match="--json needs the name of a file, got the folder"):
        check_writable("--json", str(tmp_path))
    with pytest.raises(BadUsage, match=r"--html .*a\.html can't be written: No such file"):
        check_writable("--html", str(tmp_path / "missing" / "a.html"))
    assert list(tmp_path.iterdir()) == []
