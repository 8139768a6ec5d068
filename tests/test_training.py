"""docs/training.md names every option of the step and the state, and its code runs."""

import inspect
from pathlib import Path

import pytest

import backhand as bh
from tests.test_readme import run_python

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("function", [bh.train_step, bh.train_state])
def test_every_option_is_named(function):
    options = inspect.signature(function).parameters.values()
    named = [each.name for each in options if each.kind is each.KEYWORD_ONLY]
    assert [name for name in named if f"{name}=" not in TEXT and f"`{name}`" not in TEXT] == []


def test_the_code_runs(capsys):
    run_python(TEXT, "training.md")
    assert capsys.readouterr().out == ""
