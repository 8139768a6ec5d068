"""What the two guides to the audit tell a reader to run does run: each block, each command."""

from pathlib import Path

import pytest

import backhand as bh
import pytest_backhand
from backhand.audit.check import SKIPPABLE
from tests.test_readme import blocks, check_command, commands, run_python

pytest_plugins = ["pytester"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "audit_use.md").read_text(encoding="utf-8")
AUDIT = (DOCS / "audit.md").read_text(encoding="utf-8")


def test_the_audit_shown_is_the_one_that_is_printed(capsys):
    run_python(AUDIT, "audit.md")
    out = capsys.readouterr().out
    shown = [body for language, _, body in blocks(AUDIT) if language == "text"]
    for line in shown[0].splitlines()[:5]:
        assert line in out


def test_every_check_that_can_be_left_out_is_listed():
    table = AUDIT.split("| what must hold |")[1].split("\n\n")[0]
    rows = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(rows) == SKIPPABLE


def test_python_blocks_run(capsys, pytestconfig):
    # Where the package is on the path without being installed, pytest has not found its plugin.
    pytest_backhand.pytest_configure(pytestconfig)
    run_python(TEXT, "audit_use.md")
    out = capsys.readouterr().out
    shown = "".join(body for language, _, body in blocks(TEXT) if language == "text")
    for line in shown.splitlines():
        if "..." not in line and not line.startswith(("Hint", "add up")):
            assert line in out
    hint = " ".join(shown[shown.index("Hint") :].split())
    assert hint in " ".join(out.split())


@pytest.mark.parametrize("command", commands(TEXT))
def test_command_works(command, tmp_path):
    check_command(command, tmp_path)


def test_the_tests_shown_pass(pytester):
    python = [body for language, _, body in blocks(TEXT) if language == "python"]
    shown = "".join(body for body in python if "def test_" in body)
    pytester.makepyfile("import jax, jax.numpy as jnp\n" + shown)
    result = pytester.runpytest_inprocess("-p", "pytest_backhand", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)


def test_every_exercise_listed_exists():
    assert str(bh.audit.exercises()).splitlines()[0] in TEXT
