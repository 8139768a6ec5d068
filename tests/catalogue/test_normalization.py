"""The rows of normalization: masks with both values, and groups of one, some and all features."""

from backhand.catalogue.normalization import ROWS


def test_a_mask_leaves_some_positions_out():
    rows = [row for row in ROWS if row.name.endswith("batch_norm")]
    assert len(rows) == 2
    for row in rows:
        arguments = row.arguments()
        mask = arguments[-1] if row.name.startswith("ops") else arguments[-1]["mask"]
        assert mask.any() and not mask.all()


def test_groups_are_one_some_and_several():
    assert {row.settings["groups"] for row in ROWS if row.name == "ops.group_norm"} == {1, 2, 4}
