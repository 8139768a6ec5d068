"""The table that the documentation shows."""

from backhand.audit.result import Cause
from backhand.audit.selftest.outcome import Outcome
from backhand.audit.selftest.rival import Rival
from backhand.audit.selftest.table import BEGIN, END, markdown, written
from backhand.audit.selftest.tally import Tally

W = frozenset({"w"})


def counts():
    tally = Tally()
    for dtype in ("float32", "float64"):
        tally.right(dtype, "ops.tanh()", True)
        for kind, cause in (("sign", "sign"), ("one element", "unknown")):
            outcome = Outcome(W, W, Cause(cause, "in words"))
            tally.bug(dtype, kind, "ops.tanh()", outcome, frozenset({"sign", "element"}))
    return tally


def cells(table, name):
    """The cells of the line that begins with a name."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_totals_and_kinds_are_shown_by_dtype():
    table = markdown(counts(), Rival(), 1, 2.5)
    assert cells(table, "float32") == ["2", "2", "2", "1", "1", "0"]
    assert cells(table, "sign") == [*["1 of 1", "100%"] * 2, "sign 100%"]
    assert cells(table, "one element") == [*["1 of 1", "0%"] * 2, "unknown 100%"]
    assert cells(table, "`bh.check`, every check") == ["", "", "", "", "0", "0"]
    assert "1 rows of the catalogue, 2 s" in table


def test_check_grads_stands_beside_at_its_own_step_and_at_the_best():
    rival = Rival()
    rival.correct.update({"float32": 4, "float64": 4})
    rival.alarms.update({("float32", None): 3, ("float32", 1e-3): 1})
    rival.alarms.update({("float32", 1e-2): 0, ("float32", 1e-1): 0})
    rival.bugs["float32", "sign", None] = (3, 2)
    rival.bugs["float32", "sign", 1e-2] = (3, 1)
    table = markdown(counts(), rival, 1, 2.5)
    assert "float32, step 0.01" in table
    assert cells(table, "sign")[5:] == ["2 of 3", "", "1 of 3"]
    assert cells(table, "**false alarms**") == [
        "0 of 1",
        "",
        "0 of 1",
        "",
        "",
        "3 of 4",
        "0 of 4",
        "0 of 4",
    ]


def test_every_line_of_a_table_has_as_many_cells():
    for block in markdown(counts(), Rival(), 1, 2.5).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_a_table_takes_the_place_of_the_one_in_a_document():
    document = f"# Title\n\n{BEGIN}\n\n| old |\n\n{END}\n\nMore.\n"
    once = written(document, "| new |\n")
    assert once == document.replace("old", "new")
    assert written(once, "| new |\n") == once


def test_without_marks_the_table_is_all_there_is():
    assert written("# Another document", "| new |\n") == "| new |\n"
    assert written(f"# Half of the marks {BEGIN}", "| new |\n") == "| new |\n"
