"""Rows of the feed-forward family use all that it takes."""

from backhand import ops
from backhand.catalogue import ROWS as ALL
from backhand.catalogue.feed_forward import ROWS


def test_experts_are_tried_with_and_without_a_gate_and_a_mask_one_and_more_at_a_time():
    rows = [row for row in ROWS if row.subject is ops.mixture_of_experts]
    assert set(ROWS) <= set(ALL)
    assert {(row.inputs[4] is None, row.inputs[5] is None) for row in rows} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    assert {row.settings.get("top_k", 2) for row in rows} == {1, 2, 3}
    assert None in {row.settings.get("capacity_factor", 1.25) for row in rows}
