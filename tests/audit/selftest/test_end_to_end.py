"""Bugs of the self-test, planted in ops and audited whole: `bh.check` itself finds each."""

import dataclasses

import pytest

import backhand as bh
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.plants import Site
from backhand.catalogue import ROWS

LINEAR = next(row for row in ROWS if row.subject is bh.ops.linear)
NORM = next(row for row in ROWS if row.subject is bh.ops.layer_norm)


def planted(row, kind, place):
    """The row's op with a bug of that kind in the cotangent of one argument."""
    op, arguments = row.function, row.arguments()

    def right(arguments, residuals, dy):
        return op.cotangents(residuals, dy)

    wrong = BUGS[kind].plant(right, Site((place, 0)))
    return dataclasses.replace(op, backward=lambda saved, dy: wrong(arguments, saved, dy))


@pytest.mark.parametrize(
    ("row", "kind", "place", "leaf"),
    [
        (LINEAR, "an axis of one too many", 1, "w"),
        (LINEAR, "transposed to another shape", 1, "w"),
        (LINEAR, "not summed over an axis", 2, "b"),
        (LINEAR, "summed over an axis too many", 0, "x"),
        (LINEAR, "sign", 1, "w"),
        (LINEAR, "dropped term", 1, "w"),
        (NORM, "one element", 0, "x"),
        (NORM, "wrong dtype", 1, "scale"),
    ],
    ids=str,
)
def test_the_audit_names_the_leaf_of_a_planted_bug(row, kind, place, leaf):
    audit = bh.check(planted(row, kind, place), *row.arguments(), costs=False)
    assert not audit.passed
    assert {finding.path for finding in audit.failures} >= {leaf}
