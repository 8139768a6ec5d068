"""HTML: everything that was found is in it, as text that no browser mistakes for markup."""

import dataclasses
import html.parser

import numpy as np
import pytest

from backhand.audit.html import PICTURES, of_audit, of_report, page
from backhand.audit.report import Report, Row
from backhand.audit.result import Audit, Cause, Cost, Finding, Leaf, Side

SIGN = Cause("sign", "the sign is flipped <here>")


def leaf(path="w", agrees=True, **changes):
    truth = np.arange(12.0).reshape(2, 3, 2)
    values = {
        "path": path,
        "shape": (3, 2),
        "dtype": "float32",
        "ours": truth if agrees else -truth,
        "truth": truth,
        "difference": 0.0 if agrees else 22.0,
        "relative": 0.0 if agrees else 2.0,
        "where": (2, 1),
        "agrees": agrees,
        "errors": {"float32": (1e-7, 2e-7), "bfloat16": (1e-3, 2e-3)},
        "cause": None if agrees else SIGN,
    }
    return Leaf(**{**values, **changes})


COST = Cost(Side(1.5, 2048, 1e6, {"x": 4096}), Side(3.0, None, None, {}))
AUDIT = Audit(
    "my<op>",
    (leaf(agrees=False), leaf("b")),
    (
        Finding("gradient", "w", False, "differs by 2.0e+00", SIGN),
        Finding("jit", "", True, "the same under jit"),
        Finding("vmap", "", True, "no batch & no axis", skipped=True),
    ),
    COST,
)
ROW = Row("hidden/w", (3, 2), "float32", 1.0, 0.5, (1, 1), 0.9, 1.1, False)
REPORT = Report((ROW,), ("manual", "automatic"), (1.0, 1.0), 5e-5)


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects text, tags and what is loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.loaded, self.images = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.loaded += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.images.append(given)
        if tag not in ("meta", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_an_audit_shows_verdict_leaves_causes_costs_and_pictures():
    reader = read(of_audit(AUDIT))
    text = " ".join("".join(reader.text).split())
    assert "✗ FAILED my<op>: in 1 of 2 checks" in text
    assert "w: differs by 2.0e+00: the sign is flipped <here> (gradient)" in text
    assert "✗ DIFFERS" in text
    assert "✓ agrees" in text
    assert "1.0e-07 / 2.0e-07" in text
    assert "2 KiB" in text
    assert "x 4 KiB" in text
    assert "1.5 ms" in text
    assert "unknown" in text
    assert "What passed (1)" in text
    assert "no batch & no axis" in text
    assert [image["alt"].split(":")[0] for image in reader.images] == ["w", "b"]


def test_nothing_is_loaded_and_nothing_runs():
    reader = read(page("a & b", of_audit(AUDIT), of_report(REPORT)))
    assert all(each.startswith("data:image/png;base64,") for each in reader.loaded)
    assert "script" not in reader.tags
    assert "http" not in page("title", of_audit(AUDIT))
    assert {"html", "head", "body", "title", "hr"} <= set(reader.tags)


def test_text_from_outside_is_escaped():
    evil = "<script>alert(1)</script>\"'"
    made = of_audit(
        Audit(
            evil,
            (leaf(evil, False, cause=Cause("sign", evil)),),
            (Finding(evil, evil, False, evil, Cause("sign", evil)),),
            Cost(Side(1.0, 1, 1.0, {evil: 1}), Side(1.0, 1, 1.0, {})),
        )
    )
    row = dataclasses.replace(ROW, path=evil, note=evil, cause=Cause("sign", evil))
    for fragment in (made, of_report(dataclasses.replace(REPORT, rows=(row,), names=(evil, "b")))):
        assert "script" not in read(page(evil, fragment)).tags


def test_a_report_shows_its_rows_values_and_pictures():
    gradients = np.ones((3, 2)), np.zeros((3, 2))
    wrong = dataclasses.replace(ROW, gradients=gradients, cause=SIGN)
    right = dataclasses.replace(ROW, path="out/b", agrees=True, note="rounding: by float64")
    reader = read(of_report(dataclasses.replace(REPORT, rows=(wrong, right))))
    text = " ".join("".join(reader.text).split())
    assert "✗ DIFFERS manual and automatic gradients DIFFER in 1 of 2 leaves" in text
    assert "manual 1.0, automatic 1.0" in text
    assert "hidden/w: the sign is flipped <here>" in text
    assert "✓ agrees rounding: by float64" in text
    assert len(reader.images) == 1
    assert "6 of 6 elements too large" in reader.images[0]["alt"]


def test_a_report_that_agrees_has_nothing_to_say_of_causes():
    right = dataclasses.replace(REPORT, rows=(dataclasses.replace(ROW, agrees=True),))
    assert "What is wrong" not in of_report(right)
    assert "✓ agrees" in of_report(right)


def test_leaves_that_differ_have_their_pictures_first_and_there_are_not_too_many():
    leaves = tuple(leaf(f"right{i}") for i in range(2 * PICTURES))
    reader = read(of_audit(Audit("many", (*leaves, leaf("wrong", agrees=False)), ())))
    assert len(reader.images) == PICTURES
    assert reader.images[0]["alt"].startswith("wrong: ")


def test_a_notebook_shows_the_fragment():
    assert AUDIT._repr_html_() == of_audit(AUDIT)
    assert REPORT._repr_html_() == of_report(REPORT)


@pytest.mark.parametrize("audit", [Audit("empty", (), ()), dataclasses.replace(AUDIT, cost=None)])
def test_what_there_is_none_of_is_left_out(audit):
    assert "What it costs" not in of_audit(audit)
    read(of_audit(audit))
