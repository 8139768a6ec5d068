"""The rows of pooling: every op over one, two or three spatial axes, padded and not."""

from backhand.catalogue.pooling import ROWS


def test_windows_overlap_leave_gaps_and_reach_over_the_border():
    rows = [row for row in ROWS if row.name == "ops.max_pool"]
    assert {len(row.inputs[0].axes.split()) for row in rows} == {3, 4, 5}
    pairs = [
        (k, s)
        for r in rows
        for k, s in zip(
            r.settings["window"], r.settings.get("stride") or r.settings["window"], strict=True
        )
    ]
    assert any(s < k for k, s in pairs) and any(s > k for k, s in pairs)
    paddings = {str(row.settings.get("padding", "VALID")) for row in rows}
    assert {"VALID", "SAME"} < paddings


def test_adaptive_pooling_is_tried_where_it_divides_and_where_not():
    rows = [row for row in ROWS if row.name == "ops.adaptive_average_pool"]
    even = {
        all(
            n % s == 0
            for n, s in zip(row.arguments()[0].shape[1:-1], row.settings["sizes"], strict=True)
        )
        for row in rows
    }
    assert even == {True, False}
