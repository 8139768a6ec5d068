"""The rows of attention use all that it takes."""

import inspect

import pytest

from backhand import layers, ops
from backhand.catalogue.attention import ROWS


@pytest.mark.parametrize("op", [ops.attention, ops.rotary, ops.sinusoidal], ids=lambda op: op.name)
def test_every_array_that_may_be_left_out_is_given_somewhere(op):
    rows = [row for row in ROWS if row.subject is op]
    names = [
        name
        for name, parameter in inspect.signature(op.forward).parameters.items()
        if parameter.kind is not parameter.KEYWORD_ONLY
    ]
    assert all(len(row.inputs) == len(names) for row in rows)
    for index, name in enumerate(names):
        assert any(row.inputs[index] is not None for row in rows), name


def test_every_setting_of_the_layer_but_its_initializer_is_tried():
    rows = [row for row in ROWS if row.subject is layers.multi_head_attention]
    known = set(inspect.signature(layers.multi_head_attention).parameters)
    assert set().union(*(row.settings for row in rows)) == known - {"initializer"}
