"""The CSV reader: what it reads, how it decides on kinds, and what it says of a bad file."""

import csv
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backhand.data import houses, read_table

MISSING = ["", "NA", "N/A", "n/a", "nan", "NaN", "null", "NULL", "?", "-", "  "]


@pytest.fixture
def write(tmp_path):
    """Write text or bytes as a file, and give its path."""

    def write(content):
        path = tmp_path / "data.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def error(path, *, target="y", **options):
    with pytest.raises(ValueError) as caught:
        read_table(path, target=target, **options)
    return str(caught.value)


# What is read


def test_numbers_and_categories_are_told_apart_and_kept_in_file_order(write):
    table = read_table(write("b,y,a\nred,1,2\nblue,-3.5,1e3\n"), target="y")
    assert list(table.columns) == ["b", "a"]
    assert table.columns["b"].tolist() == ["red", "blue"]
    assert table.columns["a"].tolist() == [2, 1000]
    assert table.columns["a"].dtype == np.float64
    assert table.targets.tolist() == [1, -3.5]
    assert (table.target, table.dropped) == ("y", 0)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
            st.text("abcé ,;\"'\n", max_size=6),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        max_size=10,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_csv_module_writes_is_read_back(tmp_path, rows, end):
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=end).writerows([("x", "c", "y"), *rows])
    table = read_table(path, target="y", numeric=("x",), categorical=("c",))
    expected = [np.nan if x is None else x for x, _, _ in rows]
    np.testing.assert_array_equal(table.columns["x"], expected)
    assert table.columns["c"].tolist() == [c.strip() for _, c, _ in rows]
    assert table.targets.tolist() == [y for _, _, y in rows]


def test_made_houses_written_to_a_file_are_the_same_table(tmp_path):
    made = houses(50, seed=0)
    path = tmp_path / "houses.csv"
    with path.open("w", newline="") as file:
        rows = zip(*(v.tolist() for v in made.columns.values()), made.targets.tolist(), strict=True)
        csv.writer(file).writerows([[*made.columns, made.target], *rows])
    read = read_table(path, target="price")
    assert list(read.columns) == list(made.columns)
    for name, values in made.columns.items():
        np.testing.assert_array_equal(read.columns[name], values)
    np.testing.assert_array_equal(read.targets, made.targets)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfx,c,y\n1,a,2\n3,b,4\n",
        b'\xef\xbb\xbf"x","c","y"\r\n"1","a","2"\r\n"3","b","4"\r\n',
        b"x,c,y\r\n1,a,2\r\n3,b,4",
        b'x, "c", y\n 1 , "a", 2\n3, b ,4\n',
        b"\n\nx,c,y\n\n1,a,2\n   \n3,b,4\n\n",
    ],
    ids=["byte order mark", "quoted", "no last line end", "spaces", "blank lines"],
)
def test_byte_order_marks_quotes_line_ends_spaces_and_blank_lines_make_no_difference(
    write, content
):
    table = read_table(write(content), target="y")
    assert table.columns["x"].tolist() == [1, 3]
    assert table.columns["c"].tolist() == ["a", "b"]
    assert table.targets.tolist() == [2, 4]


def test_a_quoted_cell_may_hold_delimiters_quotes_and_line_ends(write):
    table = read_table(write('c,y\n"a, b",1\n"say ""x""",2\n"two\r\nlines",3\n'), target="y")
    assert table.columns["c"].tolist() == ["a, b", 'say "x"', "two\r\nlines"]


def test_another_delimiter_can_be_named(write):
    assert read_table(write("x;y\n1;2\n"), target="y", delimiter=";").targets.tolist() == [2]


@pytest.mark.parametrize("cell", MISSING)
def test_every_way_of_writing_missing_is_read_as_missing(write, cell):
    table = read_table(write(f"x,c,y\n1,a,5\n2,b,6\n{cell},{cell},7\n8,d,{cell}\n"), target="y")
    np.testing.assert_array_equal(table.columns["x"], [1, 2, np.nan])
    assert table.columns["c"].tolist() == ["a", "b", ""]
    assert table.targets.tolist() == [5, 6, 7]
    assert table.dropped == 1


# Numeric or categorical


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "2.", ".5", "-1e-3", "+4E2"], "f"),
        (["1", "?", "", "-"], "f"),
        (["a", "b", "1"], "U"),
        (["", "NA", "?"], "U"),
        (["0x1F", "12a", "1e", "."], "U"),
        (["2024-01-02", "2024-01-03"], "U"),
    ],
)
def test_a_column_is_numeric_if_at_least_half_of_its_values_are_numbers(write, cells, kind):
    rows = "".join(f"{cell},1\n" for cell in cells)
    assert read_table(write("x,y\n" + rows), target="y").columns["x"].dtype.kind == kind


def test_a_stray_cell_of_text_in_a_numeric_column_is_named(write):
    path = write('x,c,y\n1,"two\nlines",1\n\n3,a,2\nabout 4,b,3\n5,d,4\n')
    message = error(path)
    assert message.startswith(f"{path}, line 6, column 'x': needs a number, got 'about 4'; ")
    assert "leave it empty" in message
    assert "categorical=('x',)" in message


@pytest.mark.parametrize(
    "cell", ['"1,200"', '"1.234,56"', "$450000", "€ 1 200", "12%", '"3,5"', "1_000", "1'000"]
)
def test_a_decorated_number_is_an_error_and_never_a_category(write, cell):
    message = error(write(f"x,y\n{cell},1\n{cell},2\n"))
    assert "line 2, column 'x': needs a number" in message
    assert "write it as 1234.5" in message


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(write, cell):
    message = error(write(f"x,y\n1,1\n{cell},2\n"))
    assert f"line 3, column 'x': needs a finite number, got '{cell}'" in message


def test_the_caller_can_overrule_the_kind(write):
    path = write("postcode,size,y\n1010,S,1\n1020,40,2\n1010,M,3\n")
    table = read_table(path, target="y", categorical=("postcode",))
    assert table.columns["postcode"].tolist() == ["1010", "1020", "1010"]
    message = error(path, numeric=("size",))
    assert "line 2, column 'size': needs a number, got 'S'" in message


def test_ignored_columns_are_left_out_and_not_checked(write):
    table = read_table(write("id,x,y\n1,2,3\nx,3,4\n2,5,6\n"), target="y", ignore=("id",))
    assert list(table.columns) == ["x"]


# What is wrong with a file


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*none\.csv"):
        read_table(tmp_path / "none.csv", target="y")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_refused(write, content):
    assert "is empty; it needs a header row" in error(write(content))


def test_a_header_without_rows_is_refused(write):
    assert "has a header, ['x', 'y'], and no row under it" in error(write("x,y\n\n"))


def test_duplicate_names_are_refused(write):
    assert "column names must differ, got ['x'] twice" in error(write("x,y,x\n1,2,3\n"))


def test_a_column_without_a_name_is_refused(write):
    assert "every column needs a name, got none for column 1" in error(write(",y\n1,2\n"))


def test_a_missing_target_column_is_answered_with_the_columns_there_are(write):
    message = error(write("a,b\n1,2\n"))
    assert "no column 'y' for the target; its columns are ['a', 'b']" in message
    assert "delimiter" not in message


def test_the_wrong_delimiter_is_hinted_at(write):
    assert "pass the delimiter that the file uses" in error(write("a;y\n1;2\n"))


@pytest.mark.parametrize(("row", "cells"), [("1", 1), ("1,2,3", 3)])
def test_a_ragged_row_is_named_by_the_line_an_editor_shows(write, row, cells):
    message = error(write(f'c,y\r\n"two\r\nlines",1\r\n\r\n{row}\r\nb,2\r\n'))
    assert f"line 5: a row needs 2 cells, as many as the header, got {cells}" in message


@pytest.mark.parametrize("row", ['"abc,1\n2,3', '"a"b,1'])
def test_broken_quotes_are_named_by_the_line_they_open_on(write, row):
    assert "line 3: the row is not valid CSV" in error(write(f"c,y\na,1\n{row}\n"))


@pytest.mark.parametrize("content", ["x,y\né,1\n".encode("latin-1"), "x,y\n1,2".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_refused(write, content):
    assert "must be text in UTF-8" in error(write(content))


def test_text_in_the_target_is_named_without_a_way_around_it(write):
    message = error(write("x,y\n1,2\n2,cheap\n"))
    assert "line 3, column 'y': needs a number, got 'cheap'" in message
    assert "categorical" not in message


def test_a_target_that_is_never_given_is_refused(write):
    assert "no row whose target 'y' is given" in error(write("x,y\n1,\n2,NA\n"))


def test_a_table_of_the_target_alone_is_refused(write):
    assert "needs a column to predict 'y' from" in error(write("y\n1\n"))
    assert "needs a column to predict 'y' from" in error(write("x,y\n1,2\n"), ignore=("x",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numeric": ("z",)}, "no column 'z' for numeric"),
        ({"categorical": "x"}, "categorical takes a tuple of names, got the string 'x'"),
        ({"numeric": ("x",), "categorical": ("x",)}, "got it for numeric and categorical"),
        ({"ignore": ("y",)}, "column 'y' may be given once, got it for target and ignore"),
    ],
)
def test_options_that_do_not_fit_the_header_are_refused(write, options, message):
    assert re.search(message, error(write("x,y\n1,2\n"), **options))


def test_a_long_cell_is_cut_short_in_the_message(write):
    assert len(error(write(f"x,y\n1,1\n{'word ' * 1000},2\n"))) < 400
