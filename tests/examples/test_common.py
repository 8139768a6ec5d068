"""What the examples share: every flag is checked before training, in one line, with status 2."""

import builtins
import json
import math
import os
import tempfile

import jax
import jax.numpy as jnp
import pytest

from common import OPTIMIZERS, Parser, cosine, progress, write_metrics


@pytest.fixture
def parser():
    return Parser("An example.", steps=10, batch_size=8, learning_rate=0.1, optimizer="adam")


@pytest.fixture
def error(parser, capsys):
    """The one line that a command line is refused with."""

    def error(*argv):
        with pytest.raises(SystemExit) as caught:
            parser.parse(list(argv))
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return error


def test_the_defaults_are_those_of_the_example(parser):
    args = parser.parse([])
    assert (args.steps, args.batch_size, args.learning_rate) == (10, 8, 0.1)
    assert (args.optimizer, args.accumulate, args.gradients) == ("adam", 1, "manual")
    assert (args.seed, args.json) == (0, None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--steps", "many"], "--steps"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be finite and above 0, got 0.0"),
        (["--learning-rate", "nan"], "--learning-rate must be finite and above 0, got nan"),
        (["--learning-rate", "inf"], "--learning-rate must be finite and above 0, got inf"),
        (["--accumulate", "0"], "--accumulate must be a divisor of the batch size 8, got 0"),
        (["--accumulate", "3"], "--accumulate must be a divisor of the batch size 8, got 3"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--gradients", "numeric"], "'numeric'"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(error, argv, said):
    assert said in error(*argv)


def test_an_unknown_optimizer_is_refused_with_the_known_ones(error):
    message = error("--optimizer", "sdg")
    assert all(name in message for name in ["sdg", *OPTIMIZERS])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_a_parameter_less_and_less(parser, name):
    optimizer = cosine(parser.parse(["--optimizer", name, "--learning-rate", "0.1"]))
    steps = []
    with jax.numpy_dtype_promotion("standard"):  # Optax's rules mix dtypes
        params = jnp.ones(())
        state = optimizer.init(params)
        for _ in range(11):
            update, state = optimizer.update(jnp.ones(()), state, params)
            steps.append(float(update))
    assert steps[0] < 0
    assert steps[10] == 0


def test_metrics_go_only_where_they_can_be_written(error, tmp_path, monkeypatch):
    assert "No such file or directory" in error("--json", str(tmp_path / "missing" / "a.json"))
    assert "got the folder" in error("--json", str(tmp_path))

    def refuse(**_):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "can't be written: Permission denied" in error("--json", str(tmp_path / "a.json"))


def test_checking_where_metrics_go_leaves_nothing_there(parser, tmp_path):
    parser.parse(["--json", str(tmp_path / "a.json")])
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_written_whole_and_replace_the_old(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"accuracy": 0.5})
    write_metrics(path, {"accuracy": 0.75, "agree": True, "loss": math.nan})
    assert json.loads(path.read_text()) == {"accuracy": 0.75, "agree": True, "loss": None}
    assert list(tmp_path.iterdir()) == [path]
    write_metrics(None, {"accuracy": 1.0})


def test_the_bar_is_quiet_where_there_is_no_terminal(capsys):
    bar = progress(3)
    assert list(bar) == [0, 1, 2]
    bar.set_postfix(loss="0.1")
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress(3)) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err


def test_a_missing_progress_bar_says_how_to_install_it(parser, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError("No module named 'tqdm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SystemExit) as caught, parser.one_line_errors():
        progress(3)
    assert caught.value.code == 2
    assert 'pip install "backhand[examples]"' in capsys.readouterr().err


def test_help_begins_with_what_the_example_says_of_itself(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "An example." in text
    assert "default: 10" in text
