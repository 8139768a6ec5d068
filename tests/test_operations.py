"""docs/operations.md names every op and loss, each has an example, and its code runs."""

from pathlib import Path

import pytest

import backhand as bh
from backhand import combinators, layers
from tests.test_readme import run_python

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [bh.ops, bh.losses, layers, combinators])
def test_everything_public_is_named(module):
    assert [name for name in module.__all__ if f"`{name}`" not in TEXT] == []


@pytest.mark.parametrize("module", [bh.ops, bh.losses])
def test_every_op_has_an_example(module):
    each = {name: getattr(module, name) for name in module.__all__}
    assert [n for n, op in each.items() if ">>>" not in getattr(op, "forward", op).__doc__] == []


def test_the_code_runs():
    run_python(TEXT, "operations.md")
