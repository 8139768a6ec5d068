"""Every loss is in the table with and without weights, and some settings that are not defaults."""

from backhand import losses
from backhand.catalogue import ROWS
from backhand.catalogue.losses import ROWS as OWN


def test_each_has_a_row_with_weights_and_one_without():
    assert set(OWN) <= set(ROWS)
    for name in losses.__all__:
        rows = [row for row in ROWS if row.name == f"losses.{name}"]
        given = {any(spec is not None for spec in row.inputs[-1:]) for row in rows}
        assert given == {True, False}, name
