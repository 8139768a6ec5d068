"""The Equinox model: with three ops swapped it trains to the same loss."""

import json

import jax
import pytest

import equinox_digits


def test_both_models_train_alike(tmp_path, capsys):
    path = tmp_path / "metrics.json"
    with jax.numpy_dtype_promotion("standard"):  # Optax and the library rely on it
        equinox_digits.main(["--steps", "30", "--json", str(path)])
    metrics = json.loads(path.read_text())
    assert metrics.keys() == {"loss", "loss_swapped", "largest_difference", "time_ratio"}
    assert metrics["loss"] < 1.5
    assert metrics["loss_swapped"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert 0 < metrics["largest_difference"] < 1e-5  # other code: not the same to the last bit
    assert "never further apart than" in capsys.readouterr().out


def test_flags_that_another_librarys_step_has_no_use_for_are_refused(capsys):
    with pytest.raises(SystemExit):
        equinox_digits.main(["--accumulate", "2"])
    assert "--accumulate" in capsys.readouterr().err
