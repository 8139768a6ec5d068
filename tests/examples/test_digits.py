"""The digits: tiny runs of every flag that matters, and a real one."""

import json

import numpy as np
import pytest

import digits


@pytest.fixture
def run(tmp_path):
    """Run the example, and give the metrics that it writes."""

    def run(*argv):
        path = tmp_path / "metrics.json"
        digits.main([*argv, "--json", str(path)])
        return json.loads(path.read_text())

    return run


def test_a_real_run_reads_the_digits(run, capsys):
    metrics = run()
    assert metrics["test_accuracy"] >= 0.97
    assert metrics["gradients_agree"]
    text = capsys.readouterr().out
    assert f"test accuracy {metrics['test_accuracy']:.2%} on 359 images" in text
    assert "agree in all 6 leaves" in text


def test_manual_and_automatic_gradients_train_alike(run):
    manual, automatic = (
        run("--steps", "20", "--gradients", gradients) for gradients in ("manual", "automatic")
    )
    assert manual.keys() == {"test_accuracy", "loss", "gradients_agree"}
    assert manual["loss"] == pytest.approx(automatic["loss"], rel=1e-3)
    assert manual["test_accuracy"] == pytest.approx(automatic["test_accuracy"], abs=0.02)


def test_it_trains_in_micro_batches(run):
    assert run("--steps", "20", "--accumulate", "4")["loss"] < 2.3


def test_a_seed_gives_the_same_run_again(run):
    first, again, other = (run("--steps", "5", "--seed", seed) for seed in "778")
    assert first == again
    assert first != other


def test_bad_flags_are_refused_before_training(monkeypatch, capsys):
    monkeypatch.setattr(digits.bh.data, "digits", lambda: pytest.fail("training has begun"))
    for argv in (["--accumulate", "7"], ["--optimizer", "sdg"], ["--json", "/missing/a.json"]):
        with pytest.raises(SystemExit) as caught:
            digits.main(argv)
        assert caught.value.code == 2
        assert argv[0] in capsys.readouterr().err


def test_a_missing_data_set_is_one_line(monkeypatch, capsys):
    def refuse():
        raise ImportError("digits() needs scikit-learn")

    monkeypatch.setattr(digits.bh.data, "digits", refuse)
    with pytest.raises(SystemExit) as caught:
        digits.main(["--steps", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: digits() needs scikit-learn\n")


def test_backhand_compare_finds_two_gradients_that_agree():
    report = digits.audit()
    assert report.agrees
    assert len(report.rows) == 6


def test_images_are_drawn_side_by_side():
    ink = np.zeros((2, 64), np.float32)
    ink[0, 0], ink[1, 63] = 1, 1
    rows = digits.draw(ink).split("\n")
    assert len(rows) == 8
    assert rows[0] == "@@" + " " * 34
    assert rows[7] == " " * 34 + "@@"


def test_mistakes_are_shown_with_what_they_were_read_as(capsys):
    images = np.zeros((3, 64), np.float32)
    digits.show_mistakes(images, np.array([1, 2, 3]), np.array([1, 7, 3]))
    assert "a 2, read as a 7" in capsys.readouterr().out
    digits.show_mistakes(images, np.array([1, 2, 3]), np.array([1, 2, 3]))
    assert capsys.readouterr().out == ""
