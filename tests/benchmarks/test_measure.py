"""benchmarks/measure.py: times in turns, and ratios that hide no loss."""

import pytest

from benchmarks.measure import in_turns, memory_ratio


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"),
    [(0, 0, 1.0), (999, 0, 1.0), (1000, 0, None), (2000, 500, 4.0), (500, 2000, 0.25)],
)
def test_memory_where_theirs_needs_none_is_no_tie(ours, theirs, ratio):
    assert memory_ratio(ours, theirs) == ratio


def test_quartiles_lie_around_the_median():
    timing = in_turns(lambda: sum(range(2000)), lambda: sum(range(1000)), samples=5, seconds=1e-3)
    assert 0 < timing.low <= timing.ratio <= timing.high
    assert timing.milliseconds[0] > 0
