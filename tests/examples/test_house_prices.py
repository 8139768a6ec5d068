"""The house prices: made ones, a real table, and what is said of a bad one."""

import json

import numpy as np
import pytest

import house_prices


@pytest.fixture
def run(tmp_path):
    """Run the example, and give the metrics that it writes."""

    def run(*argv):
        path = tmp_path / "metrics.json"
        house_prices.main([*map(str, argv), "--json", str(path)])
        return json.loads(path.read_text())

    return run


@pytest.fixture
def error(capsys):
    """The one line that a command line is refused with."""

    def error(*argv):
        with pytest.raises(SystemExit) as caught:
            house_prices.main([*map(str, argv)])
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return error


@pytest.fixture
def table(tmp_path):
    """A CSV file: a price that depends on an area and a zone, some cells of each missing."""
    draw = np.random.default_rng(0)
    lines = ["id,area,zone,floor,price"]
    for i in range(300):
        area, zone = draw.uniform(40, 180), draw.choice(["north", "south", "centre"])
        price = 2000 * area + {"north": 0, "south": 50_000, "centre": 150_000}[zone]
        shown = "" if i % 29 == 0 else f"{area:.1f}"
        named = "NA" if i % 31 == 0 else zone
        lines.append(f"h{i},{shown},{named},{i % 4},{'?' if i % 50 == 49 else round(price)}")
    path = tmp_path / "houses.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_short_run_beats_the_mean_by_far_and_comes_near_the_noise(run, capsys):
    metrics = run("--steps", 500)
    assert metrics["test_root_mean_squared_error"] < 0.2 * metrics["mean_root_mean_squared_error"]
    assert 17_000 < metrics["test_root_mean_squared_error"] < 24_000
    assert metrics["test_mean_absolute_error"] < metrics["test_root_mean_squared_error"]
    assert metrics["gradients_agree"]
    text = capsys.readouterr().out
    assert "in euros" in text
    assert "20,000" in text
    assert text.endswith("tolerance 9.5e-06\n")


def test_a_table_with_categories_and_missing_cells_is_read_and_learned(run, table, capsys):
    given = ["--data", table, "--target", "price", "--ignore", "id", "--categorical", "floor"]
    metrics = run("--steps", 300, *given)
    assert metrics["test_root_mean_squared_error"] < 0.4 * metrics["mean_root_mean_squared_error"]
    text = capsys.readouterr().out
    assert "294 rows, target price" in text
    assert "numeric: area" in text
    assert "categorical: zone, floor" in text
    assert "rows dropped for want of a target: 6" in text
    assert "in the unit of price" in text
    assert "noise" not in text


def test_small_errors_are_shown_in_full(capsys):
    house_prices.show({"a": (0.1234, 0.25), "another": (1.0, 2.0)})
    assert "0.123" in capsys.readouterr().out


def test_manual_and_automatic_gradients_train_alike(run):
    manual, automatic = (
        run("--steps", 20, "--gradients", gradients) for gradients in ("manual", "automatic")
    )
    assert manual == pytest.approx(automatic, rel=1e-3)


def test_micro_batches_give_the_step_of_the_whole_batch(run):
    whole, parts = (run("--steps", 20, "--accumulate", parts) for parts in (1, 4))
    assert whole == pytest.approx(parts, rel=1e-3)


def test_text_in_a_column_of_numbers_is_placed(error, table):
    lines = table.read_text().splitlines()
    lines[2] = "h1,large,north,1,200000"
    table.write_text("\n".join(lines))
    message = error("--data", table, "--target", "price", "--ignore", "id")
    assert f"{table}, line 3, column 'area': needs a number, got 'large'" in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--target", "price"], "--target needs a table: pass --data FILE"),
        (["--ignore", "id"], "--ignore needs a table: pass --data FILE"),
        (["--data", "a.csv"], "--data needs --target NAME"),
        (["--data", "missing.csv", "--target", "price"], "no file at missing.csv"),
    ],
)
def test_what_is_missing_is_named(error, argv, said):
    assert said in error(*argv)


def test_an_unknown_target_is_answered_with_the_columns(error, table):
    message = error("--data", table, "--target", "prise")
    assert "no column 'prise'" in message
    assert "'price'" in message


def test_a_column_that_identifies_rows_is_named(error, table):
    many = "\n".join(f"h{i},{i},north,1,{i}" for i in range(1000, 1400))
    table.write_text("id,area,zone,floor,price\n" + many)
    assert "ignore=('id',)" in error("--data", table, "--target", "price")
