"""Every public op, loss, layer and combinator has a row, and every row is of one."""

import pytest

from backhand import combinators, layers, losses, ops
from backhand.catalogue import ROWS

MODULES = {"ops": ops, "losses": losses, "layers": layers, "combinators": combinators}


def without_row(module, rows):
    """The public names of a module that no row is of."""
    subjects = {row.name: getattr(row.subject, "func", row.subject) for row in rows}
    return [
        name
        for name in MODULES[module].__all__
        if subjects.get(f"{module}.{name}") is not getattr(MODULES[module], name)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_row(module):
    assert without_row(module, ROWS) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_row_that_is_missing_is_noticed(module):
    for name in MODULES[module].__all__:
        rest = [row for row in ROWS if row.name != f"{module}.{name}"]
        assert without_row(module, rest) == [name]


def test_every_row_is_of_something_public():
    for row in ROWS:
        module, name = row.name.split(".")
        assert name in MODULES[module].__all__


def test_what_cannot_apply_to_a_row_has_a_name_and_a_reason():
    for row in ROWS:
        for transformation, reason in row.without.items():
            assert transformation == "split parameters" and len(reason.split()) > 5
