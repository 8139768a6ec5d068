"""What each tap meets."""

from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_taps import padded, taps
from tests.support import normal


def test_taps_are_what_windows_see_in_turn():
    x = normal(0, 1, 5, 1)
    windows = Geometry((2,), ((1, 0),), (2,), 1)
    between = padded(x, windows)
    assert between[0, 0, 0] == 0 and between.shape == (1, 6, 1)
    seen = [tap.ravel().tolist() for tap in taps(between, (2,), windows, (2,))]
    values = [0.0, *x.ravel().tolist()]
    assert seen == [[values[0], values[2]], [values[2], values[4]]]
