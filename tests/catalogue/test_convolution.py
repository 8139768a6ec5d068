"""The rows of convolutions try every setting, in every number of dimensions."""

import inspect

import pytest

from backhand import layers, ops
from backhand.catalogue.convolution import ROWS


@pytest.mark.parametrize(
    "subject",
    [
        ops.convolution,
        ops.transposed_convolution,
        layers.conv,
        layers.depthwise_conv,
        layers.conv_transpose,
    ],
    ids=lambda subject: getattr(subject, "name", getattr(subject, "__name__", "")),
)
def test_every_setting_but_an_initializer_is_tried(subject):
    rows = [row for row in ROWS if row.subject is subject]
    function = getattr(subject, "forward", subject)
    known = set(inspect.signature(function).parameters) - {"x", "w", "initializer"}
    assert set().union(*(row.settings for row in rows)) == known


@pytest.mark.parametrize(
    "op", [ops.convolution, ops.transposed_convolution], ids=lambda op: op.name
)
def test_one_two_and_three_dimensions_are_tried(op):
    ranks = {len(row.inputs[0].axes.split()) - 2 for row in ROWS if row.subject is op}
    assert ranks == {1, 2, 3}
