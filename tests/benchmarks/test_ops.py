"""benchmarks/ops: every op has a case, and its rows can be written, read back and replaced."""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from benchmarks.ops import __main__ as command
from benchmarks.ops import cases
from benchmarks.ops.case import Case, Row, measure, normal, with_errors
from benchmarks.ops.errors import draw
from benchmarks.ops.peer import Peer
from benchmarks.ops.table import line, merged, read, summary
from benchmarks.report import write

TRIVIAL = {"cast", "flatten", "reshape", "with_state"}
"""What XLA makes no work of, or hands another loss on: there is no backward pass to be fast at."""

IN_ANOTHER_ROW = {
    # Layers whose whole work is an op's: they make the parameters.
    **{"dense": "linear", "rnn": "elman", "standardized": "weight_standardization"},
    **{"conv": "convolution", "depthwise_conv": "convolution"},
    "conv_transpose": "transposed_convolution",
    # Parts of a model that is a row: the tied table, and blocks of an encoder and a decoder.
    **{"unembedding": "share", "skip": "chain", "on": "chain", "pick": "chain"},
    "checkpoint": "repeat",
    # What runs is the layer inside, with less to compute, other names, or a sum beside it.
    **{"freeze": "chain", "rename": "chain", "tally": "mixture_of_experts"},
    # Its branches' outputs in a tuple, or their sum: each branch is what it is alone.
    **{"parallel": "chain", "add": "chain"},
}
"""Layers and combinators without a row of their own, and the row whose case has their work."""

ROW = Row("relu", "4 x 4", "float32", 0.5, 0.4, 0.6, 1.0, *[1e-7] * 4, (1.0, 2.0), (0.0, 0.0))


@pytest.fixture(scope="module")
def every():
    return list(cases())


def test_every_op_and_loss_is_measured(every):
    catalogue = {*bh.ops.__all__, *bh.losses.__all__}
    assert catalogue > TRIVIAL
    assert catalogue - {case.op for case in every} == TRIVIAL


def test_every_layer_and_combinator_is_measured_or_is_made_of_what_is(every):
    measured = {case.op for case in every}
    without = {*bh.layers.__all__, *bh.combinators.__all__} - measured - TRIVIAL
    assert without == IN_ANOTHER_ROW.keys()
    assert measured.issuperset(IN_ANOTHER_ROW.values())


def test_no_two_cases_have_one_name(every):
    names = [case.name for case in every]
    assert len(names) == len(set(names))


def test_listing_the_cases_makes_no_array(every):
    before = jax.live_arrays()  # kept, so that no new array can have the address of an old one
    listed = list(cases())
    made = {id(array) for array in jax.live_arrays()} - {id(array) for array in before}
    assert len(listed) == len(every)
    assert not made


def small(ours=bh.ops.tanh):
    return Case("tanh", "8", lambda: (normal(8, 8),), ours, jnp.tanh)


def test_a_row_of_the_benchmark():
    row = measure(small(), "2001-02-03", samples=3, seconds=1e-4)
    assert row.name == ("tanh", "8", "float32")
    assert row.time_low <= row.time_ratio <= row.time_high
    assert row.memory_ratio == 1.0
    assert 0 < row.rms_error < row.error < 1e-6
    assert 0 < row.autodiff_rms_error < row.autodiff_error < 1e-6
    assert row.torch_time_ratio is None


def test_the_fastest_layout_of_pytorch_is_the_one_that_counts(monkeypatch):
    layouts = [Peer("first", lambda: time.sleep(0.02)), Peer("last", lambda: None)]
    monkeypatch.setattr("benchmarks.ops.case.peers", lambda forms, *arguments: layouts)
    row = measure(small(), "", samples=1, seconds=0)
    assert row.torch_layout == "last" and row.torch_others.keys() == {"first"}
    assert f"{row.torch_others['first']:.2f} (first) |" in line(row)


def test_a_wrong_reverse_has_a_large_error():
    tanh = bh.ops.tanh
    wrong = bh.Op("tanh", tanh.forward, lambda y, dy: dy * (1 - y), tanh.reference)
    row = measure(small(wrong), "", samples=1, seconds=0)
    assert min(row.error, row.rms_error) > 0.1 and row.autodiff_error < 1e-6
    again = with_errors(dataclasses.replace(row, error=0.0), small())
    assert again.error < 1e-6 and again.time_ratio == row.time_ratio


def test_each_draw_has_other_numbers_and_another_error():
    for first, second in zip(*(draw(jnp.tanh, (normal(4, 4),), i) for i in (0, 1)), strict=True):
        assert not (first == second).any()
    ids = jnp.arange(3)
    assert (draw(lambda x, ids: x, (normal(3), ids), 1)[2] == ids).all()


def test_only_floating_leaves_of_the_arguments_are_differentiated():
    tree = {"table": normal(5, 3), "ids": jnp.array([0, 4, 4])}
    case = Case("rows", "5", lambda: (tree,), lambda t: t["table"][t["ids"]], lookup)
    assert measure(case, "", samples=1, seconds=0).error < 1e-6


def lookup(tree):
    return jnp.take(tree["table"], tree["ids"], axis=0)


def test_the_summary_names_the_rows_that_lose():
    slow = dataclasses.replace(ROW, op="slow", time_ratio=1.2, torch_time_ratio=3.0)
    wide = dataclasses.replace(
        ROW, op="wide", memory_ratio=None, torch_time_ratio=0.5, rms_error=3e-7
    )
    lines = summary([ROW, slow, wide]).splitlines()
    assert lines == [
        "- 3 rows.",
        "- Above 1.05 in time: 1 of 3.",
        "  - slow, 4 x 4, float32 (1.20)",
        "- Above 1.05 in memory: 1 of 3.",
        "  - wide, 4 x 4, float32 (∞)",
        "- Above 1.05 in root mean square error: 1 of 3.",
        "  - wide, 4 x 4, float32 (3.00)",
        "- Of the largest errors 0 are above 1.05 of autodiff's, 0 are below it by as much.",
        "- Above 1.05 in time against PyTorch: 1 of 2.",
        "  - slow, 4 x 4, float32 (3.00)",
    ]
    assert "**∞**" in line(wide) and "| 0.50 |" in line(wide)


def test_rows_come_back_from_their_file(tmp_path):
    rows = [ROW, dataclasses.replace(ROW, op="gelu", memory_ratio=None)]
    write(tmp_path / "rows.json", rows=rows)
    assert read(tmp_path / "rows.json") == rows
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["time_low"] == 0.4


def test_rows_of_another_machine_are_not_mixed_in(tmp_path):
    write(tmp_path / "rows.json", rows=[ROW])
    text = (tmp_path / "rows.json").read_text()
    (tmp_path / "rows.json").write_text(text.replace("Python ", "Python 1."))
    with pytest.raises(SystemExit, match="measured as they would be now"):
        read(tmp_path / "rows.json")


def test_new_rows_take_the_place_of_old_ones_in_the_order_of_the_cases():
    first, last = (dataclasses.replace(ROW, op=op) for op in ("first", "last"))
    gone, new = dataclasses.replace(ROW, op="gone"), dataclasses.replace(first, time_ratio=0.1)
    assert merged([first.name, last.name], [last, gone, first], [new]) == [new, last]


def test_a_table_is_refreshed_op_by_op(tmp_path, monkeypatch):
    file, markdown = tmp_path / "rows.json", tmp_path / "rows.md"
    both = [small(), dataclasses.replace(small(bh.ops.relu), op="relu", theirs=jax.nn.relu)]
    measured = []

    def once(case, date):
        measured.append(case.op)
        return measure(case, date, samples=1, seconds=0)

    def run(*arguments):
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["ops", *map(str, arguments)])
        command.main()
        return [row.op for row in read(file)]

    monkeypatch.setattr(command, "cases", lambda: iter(both))
    monkeypatch.setattr(command, "measure", once)
    assert run("--only", "^relu", "--update", file) == ["relu"]
    assert run("--update", file, "--missing", "--markdown", markdown) == ["tanh", "relu"]
    assert measured == ["tanh"]
    assert run("--only", "^relu", "--update", file) == ["tanh", "relu"]
    assert measured == ["relu"]
    assert run("--update", file, "--errors") == ["tanh", "relu"] and not measured
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("# ") and "- 2 rows." in text and "| relu | 8 |" in text
