"""The commands: what they print and write, and the status that they end with."""

import contextlib
import json
import sys

import pytest

from backhand.cli import main

SOURCE = """
import backhand as bh, jax, jax.numpy as jnp

def swish(x):
    return x * jax.nn.sigmoid(x)

@jax.custom_vjp
def right(x):
    return swish(x)

def backward(x, dy):
    s = jax.nn.sigmoid(x)
    return (dy * (s + x * s * (1 - s)),)

right.defvjp(lambda x: (swish(x), x), backward)

@jax.custom_vjp
def wrong(x):
    return swish(x)

wrong.defvjp(lambda x: (swish(x), x), lambda x, dy: (-backward(x, dy)[0],))

@jax.custom_vjp
def breaks(x):
    return swish(x)

def broken(x, dy):
    raise RuntimeError("first line\\nsecond line")

breaks.defvjp(lambda x: (swish(x), x), broken)

def compared(sign):
    model = bh.dense(1)
    inner = bh.layer(
        "planted", model.init, model.forward,
        lambda params, x, dy: (
            {"w": sign * (x.T @ dy), "b": dy.sum(0)}, dy @ params["w"].T
        ),
    )
    loss = bh.objective(inner, bh.losses.mean_squared_error)
    batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
    return loss, loss.init(jax.random.key(0), batch), batch

def audit():
    print("on the way")
    return compared(1.0)

def differs():
    return compared(-1.0)

def refused():
    return 3, 4
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of the user's; what it has imported is forgotten afterwards."""
    path = tmp_path / "cli_cases.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(path)
    for name in [name for name in sys.modules if name.endswith("cli_cases")]:
        del sys.modules[name]


def error(capsys, *argv):
    """The one line that a command line is refused with."""
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(pytest.raises(SystemExit)) if argv[0] == "!" else None
        status = main(list(argv[1:] if argv[0] == "!" else argv))
    assert (caught.value.code if caught else status) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_a_comparison_that_agrees_ends_with_0(file, capsys):
    assert main(["compare", file]) == 0
    assert "gradients agree in all 2 leaves" in capsys.readouterr().out


def test_a_comparison_that_differs_ends_with_1_and_names_the_leaf(file, capsys, tmp_path):
    page, numbers = tmp_path / "report.html", tmp_path / "report.json"
    argv = ["compare", f"{file}:differs", "--html", str(page), "--json", str(numbers)]
    assert main(argv) == 1
    assert "DIFFER in 1 of 2 leaves" in capsys.readouterr().out
    values = json.loads(numbers.read_text())
    assert values["agrees"] is False
    assert [row["path"] for row in values["rows"] if not row["agrees"]] == ["w"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "DIFFER in 1 of 2 leaves" in text
    assert "data:image/png;base64," in text


def test_standard_output_is_json_alone(file, capsys):
    assert main(["compare", file, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["agrees"] is True
    assert "on the way" in err
    assert "agree in all 2 leaves" in err


def test_a_right_function_passes(file, capsys, tmp_path):
    numbers = tmp_path / "audit.json"
    assert main(["check", f"{file}:right", "--arg", "f32[3,2]", "--json", str(numbers)]) == 0
    assert "right: passed" in capsys.readouterr().out
    values = json.loads(numbers.read_text())
    assert values["passed"] is True
    assert [audit["name"] for audit in values["audits"]] == ["right"]


def test_a_wrong_function_ends_with_1_and_says_how(file, capsys, tmp_path):
    page = tmp_path / "audit.html"
    argv = ["check", f"{file}:wrong", "--arg", "f32[3,2]", "--html", str(page)]
    assert main([*argv, "--reference", f"{file}:swish"]) == 1
    assert "the sign is flipped" in capsys.readouterr().out
    assert "the sign is flipped" in page.read_text(encoding="utf-8")


def test_a_row_of_the_catalogue_is_checked_with_its_own_arguments(capsys):
    assert main(["check", "ops.relu"]) == 0
    assert capsys.readouterr().out.startswith("ops.relu(): passed")


def test_bad_usage_is_one_line(capsys, file, tmp_path):
    assert "there is no 'nothing.py' in" in error(capsys, "compare", str(tmp_path / "nothing.py"))
    assert "did you mean 'differs'" in error(capsys, "compare", f"{file}:difers")
    assert "takes x; give an --arg" in error(capsys, "check", f"{file}:right")
    assert "--json needs the name of a file" in error(
        capsys, "check", "ops.relu", "--json", str(tmp_path)
    )
    assert "--seed must be 0 or more, got -1" in error(capsys, "check", "ops.relu", "--seed", "-1")
    assert "there is no module 'nowhere'" in error(
        capsys, "check", f"{file}:right", "--arg", "f32[2]", "--reference", "nowhere:f"
    )
    assert "does not take 2 arguments" in error(
        capsys, "check", f"{file}:right", "--arg", "f32[2]", "--arg", "f32[2]"
    )
    assert "invalid choice: 'chek'" in error(capsys, "!", "chek", "ops.relu")
    assert "unrecognized arguments: --jsn" in error(capsys, "!", "check", "ops.relu", "--jsn")
    assert "required: TARGET" in error(capsys, "!", "compare")


def test_the_original_error_is_shown_on_request(file, capsys):
    argv = ["check", f"{file}:breaks", "--arg", "f32[2]"]
    said = error(capsys, *argv)
    assert "first line" in said
    assert "second line" not in said
    assert said.endswith("(--traceback shows where)\n")
    assert main([*argv, "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "RuntimeError: first line\nsecond line" in shown
    assert "in broken" in shown


def test_help_and_version_end_with_0(capsys):
    for argv in (["--help"], ["check", "--help"], ["compare", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "backhand check ops.linear" in out
    assert "exit status is 0" in out
