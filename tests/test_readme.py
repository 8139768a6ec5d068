"""What README.md and CONTRIBUTING.md tell a reader to run does run: each block, each command."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
MAXIMUM_WORDS = 700  # of README.md, everything in it counted
STEPS = 2  # of an example, for every example takes --steps

SHELLS = {"sh", "bash"}
NOT_RUN = {"text"}  # what a command prints, a tree of files
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)^ *```$", re.M | re.S)
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


class NotVerified(Exception):
    """A block or command that would not work, or that nothing here knows how to try."""


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, int, str]]:
    """The fenced blocks of a document: language, line before the first one, and body."""
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        body = "".join(line.removeprefix(indent) for line in match["body"].splitlines(True))
        line = text.count("\n", 0, match.start()) + 1
        found.append((match["language"].strip(), line, body))
    return found


def run_python(text: str, name: str) -> None:
    """Runs the Python blocks of a document in order, in one namespace."""
    namespace = {"__name__": "__main__"}
    for language, line, body in blocks(text):
        if language == "python":
            # The empty lines make a traceback show the document's own line numbers.
            exec(compile("\n" * line + body, name, "exec"), namespace)


def commands(text: str) -> list[str]:
    """The commands of a document's shell blocks, each once."""
    found = []
    for language, _, body in blocks(text):
        if language in SHELLS:
            for line in body.replace("\\\n", " ").splitlines():
                words = []
                for word in [*shlex.split(line.removeprefix("$ "), comments=True), "&&"]:
                    if word != "&&":
                        words.append(word)
                    elif words:
                        found.append(shlex.join(words))
                        words = []
    return list(dict.fromkeys(found))


def run(words: list[str], cwd: Path, assignments: dict[str, str]) -> None:
    """Runs a command as a reader would: without the settings that are the tests' own."""
    tests_own = {"XLA_FLAGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in tests_own and not name.startswith(("JAX_NUMPY_", "PYTEST_"))
    }
    done = subprocess.run(
        words, cwd=cwd, env=environment | assignments, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise NotVerified(
            f"{shlex.join(words)} exits with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )


def check_make(arguments: list[str], assignments: dict[str, str]) -> None:
    """Every target is a rule of the Makefile, and `make` can plan it."""
    targets = [word for word in arguments if not word.startswith("-") and "=" not in word]
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for target in targets:
        if target not in rules:
            raise NotVerified(f"the Makefile has no target {target}, only {', '.join(rules)}")
    run(["make", "-n", *arguments], ROOT, assignments)


def check_pip(arguments: list[str]) -> None:
    """Every requirement is this project or one of its dependencies, with extras that exist."""
    if arguments[:1] != ["install"]:
        raise NotVerified(f"pip {shlex.join(arguments)}: only `pip install` is known")
    requirements = [word for word in arguments[1:] if not word.startswith("-")]
    if unknown := {word for word in arguments if word.startswith("-")} - {"-e", "-U", "-q"}:
        raise NotVerified(f"pip install with {sorted(unknown)}: an unknown option")
    if not requirements:
        raise NotVerified("pip install of nothing")
    dependencies = {Requirement(each).name for each in PROJECT["dependencies"]}
    for text in requirements:
        try:
            # `.` and `.[extra]` are the checkout.
            requirement = Requirement(re.sub(r"^\.", PROJECT["name"], text))
        except InvalidRequirement as error:
            raise NotVerified(f"pip install {text}: {error}") from None
        if requirement.name == PROJECT["name"]:
            extras = set(PROJECT["optional-dependencies"])
        elif requirement.name in dependencies:
            metadata = importlib.metadata.metadata(requirement.name)
            extras = set(metadata.get_all("Provides-Extra") or ())
        else:
            raise NotVerified(f"pip install {text}: not this project, nor what it depends on")
        if not requirement.extras <= extras:
            raise NotVerified(f"pip install {text}: the extras are {sorted(extras)}")


def check_python(arguments: list[str], cwd: Path, assignments: dict[str, str]) -> None:
    """An example runs for a few steps, a module shows its help, pytest collects."""
    match arguments:
        case ["-m", "pip", *rest]:
            check_pip(rest)
        case ["-m", "pytest", *rest]:
            run([sys.executable, "-m", "pytest", "--collect-only", "-q", *rest], ROOT, assignments)
        case ["-m", module, *rest] if module.split(".")[0] in {"backhand", "benchmarks"}:
            run([sys.executable, "-m", module, *rest, "--help"], ROOT, assignments)
        case [script, *rest] if script.startswith("examples/"):
            if not (ROOT / script).exists():
                raise NotVerified(f"there is no {script}")
            words = [sys.executable, str(ROOT / script), *rest, "--steps", str(STEPS)]
            run(words, cwd, assignments)
        case _:
            raise NotVerified(f"python {shlex.join(arguments)}: an unknown kind of command")


def check_command(command: str, cwd: Path) -> None:
    """Tries one command as far as a test can; raises `NotVerified` when it would not work."""
    words = shlex.split(command)
    assignments = {}
    while words and ASSIGNMENT.match(words[0]):
        name, value = words.pop(0).split("=", 1)
        assignments[name] = value
    program, *arguments = words or [""]
    name = program.removeprefix(".venv/bin/").removeprefix(".venv-newest/bin/")
    match name, arguments:
        case "make", _:
            check_make(arguments, assignments)
        case "pip", _:
            check_pip(arguments)
        case "python" | "python3", _:
            check_python(arguments, cwd, assignments)
        case "pytest" | "backhand", _:
            check_python(["-m", name, *arguments], cwd, assignments)
        case "ruff" | "mypy", _:
            run([sys.executable, "-m", name, *arguments, "--help"], ROOT, assignments)
        case "git", ["clone", url] if re.fullmatch(r"https://\S+/backhand(\.git)?", url):
            pass
        case "cd", ["backhand"]:
            pass
        case _:
            raise NotVerified(f"{command}: an unknown kind of command; teach this test to try it")


def all_commands() -> list[str]:
    """The commands of every document, each once."""
    found = [each for name in DOCUMENTS if (ROOT / name).exists() for each in commands(read(name))]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(read(document), document)


@pytest.mark.parametrize("command", all_commands())
def test_command_works(command, tmp_path):
    check_command(command, tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_says_what_it_is(document):
    text = read(document)
    languages = {language for language, _, _ in blocks(text)}
    assert languages <= {"python"} | SHELLS | NOT_RUN
    assert len(re.findall(r"^ *(```|~~~)", text, re.M)) == 2 * len(blocks(text))


def test_readme_is_short():
    words = len(read("README.md").split())
    assert words < MAXIMUM_WORDS, f"README.md has {words} words"


def test_blocks_share_a_namespace_and_report_their_line():
    text = "Text.\n\n```python\nx = 1\n```\n\n1. A list:\n"
    text += "   ```python\n   if x:\n       y = x\n   ```\n"
    run_python(text, "a.md")
    with pytest.raises(ZeroDivisionError) as caught:
        run_python(text + "\n```python\n\ny / 0\n```\n", "a.md")
    assert caught.traceback[-1].lineno == 14  # counted from 0


def test_commands_are_read_from_shell_blocks():
    text = "```sh\n$ make demo  # a minute\nA=1 make \\\n  test && cd x\n\n```\n"
    text += "```text\nnot this\n```\n"
    assert commands(text) == ["make demo", "A=1 make test", "cd x"]


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "make tests",
        "pip install backhand[no-such-extra]",
        "pip install no-such-project",
        "pip install -e .[no-such-extra]",
        "pip install",
        "pip download backhand",
        "python examples/no_such_example.py",
        "python -m no_such_module",
        "python -m backhand.no_such_module",
        "python -c 'print(1)'",
        "git clone backhand",
        "curl https://example.org",
        "A=1",
    ],
)
def test_a_command_that_would_not_work_is_caught(command, tmp_path):
    with pytest.raises(NotVerified):
        check_command(command, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "make",
        "make demo",
        "make test PYTEST_ARGS='-k dense'",
        "pip install backhand",
        "pip install -e '.[examples]'",
        "python -m pip install -U 'jax[cuda13]'",
        ".venv/bin/python -m pytest tests/test_layout.py -k imports",
        "ruff check .",
        "git clone https://example.org/someone/backhand.git",
    ],
)
def test_a_command_that_works_passes(command, tmp_path):
    check_command(command, tmp_path)
