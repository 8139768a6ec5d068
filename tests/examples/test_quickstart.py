"""The bare loop: it learns, its reverse is jax.grad's, and it stays short."""

import json
from pathlib import Path

import pytest

import quickstart


@pytest.fixture
def run(tmp_path):
    """Run the example, and give the metrics that it writes."""

    def run(*argv):
        path = tmp_path / "metrics.json"
        quickstart.main([*argv, "--json", str(path)])
        return json.loads(path.read_text())

    return run


def test_the_loss_falls_and_the_gradient_is_that_of_jax(run, capsys):
    metrics = run("--steps", "401")
    assert metrics["loss"] < 0.5
    assert metrics["test_accuracy"] > 0.9
    assert metrics["largest_difference"] < 1e-6
    losses = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line
    ]
    assert len(losses) == 2
    assert losses[0] > 2 > losses[1]


def test_manual_and_automatic_gradients_train_alike(run):
    manual, automatic = (
        run("--steps", "20", "--gradients", gradients) for gradients in ("manual", "automatic")
    )
    assert manual["loss"] == pytest.approx(automatic["loss"], rel=1e-4)


def test_micro_batches_give_the_step_of_the_whole_batch(run):
    whole, parts = (run("--steps", "20", "--accumulate", parts) for parts in ("1", "8"))
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-4)


def test_it_knows_one_optimizer_and_says_so(capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(["--optimizer", "adam"])
    assert caught.value.code == 2
    assert "'sgd'" in capsys.readouterr().err


def test_it_fits_on_two_screens():
    assert len(Path(quickstart.__file__).read_text(encoding="utf-8").splitlines()) <= 90
