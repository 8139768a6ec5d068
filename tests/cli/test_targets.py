"""Targets: what they name is found, and what is missing is named with the closest there is."""

import sys

import pytest

from backhand.cli.targets import BadUsage, call, guarded, load, required


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a script, its helper, and a package; forgotten afterwards."""
    (tmp_path / "helper_of_target.py").write_text("VALUE = 3\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside_target.py").write_text("VALUE = 4\n")
    (tmp_path / "scripts" / "target_one.py").write_text(
        "from beside_target import VALUE\n"
        "def audit():\n    return VALUE\n"
        "class Cases:\n    def first():\n        return 5\n"
    )
    (tmp_path / "scripts" / "notes.txt").write_text("")
    (tmp_path / "target_package").mkdir()
    (tmp_path / "target_package" / "__init__.py").write_text("def inside(): return 6\n")
    (tmp_path / "target_package" / "deeper.py").write_text("def audit(): return 7\n")
    (tmp_path / "target_package" / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "scripts" / "broken.py").write_text("raise ValueError('first\\nsecond')\n")
    (tmp_path / "scripts" / "quits.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if "target" in name or name in ("broken", "quits"):
            del sys.modules[name]


def test_a_file_is_imported_as_a_script_with_its_own_folder(folder):
    assert load("scripts/target_one.py")() == 4
    assert load(f"{folder}/scripts/target_one.py:audit")() == 4
    assert load("scripts/target_one.py:Cases.first")() == 5


def test_a_file_runs_once_however_often_it_is_named(folder):
    assert load("scripts/target_one.py:Cases") is load(f"{folder}/scripts/target_one.py:Cases")


def test_a_module_is_imported_from_the_working_directory(folder):
    assert load("target_package.deeper")() == 7
    assert load("target_package:inside")() == 6
    assert load("helper_of_target:VALUE") == 3


def test_a_file_that_is_called_like_a_loaded_module_does_not_replace_it(folder):
    (folder / "json.py").write_text("def audit(): return 8\n")
    json = sys.modules["json"]
    assert load("./json.py")() == 8
    assert sys.modules["json"] is json


MISSING = {
    "scripts/target_two.py": r"no 'target_two.py' in .*scripts; did you mean 'target_one.py'",
    "skripts/target_one.py": r"there is no 'skripts' in .*; did you mean 'scripts'",
    "scripts/target_one.py:audits": r"scripts/target_one.py has no 'audits'; did you mean 'audit'",
    "scripts/target_one.py:Cases.last": r"scripts/target_one.py:Cases.last has no 'last'",
    "scripts/beside_target.py": r"has no 'audit'; name what to audit, as in scripts/.*.py:name",
    "scripts/notes.txt": "notes.txt is no Python file; its name must end in .py",
    "scripts/": "scripts is a folder; name a file in it",
    "target_packages.deeper": "there is no module 'target_packages'; did you mean 'target_package'",
    "nowhere_at_all:f": "no module 'nowhere_at_all'; run where it can be imported",
    "target_package.deepest": "target_package has no module 'deepest'; did you mean 'deeper'",
    "target_package.inside": "'inside' is no module, .* write target_package:inside",
    "target_package.deeper.more": "target_package.deeper is a module without others in it",
    "target_package.deeper:adit": "target_package.deeper has no 'adit'; did you mean 'audit'",
    "target_package.broken": "importing target_package.broken raised ModuleNotFoundError: No",
    "scripts/broken.py": "importing scripts/broken.py raised ValueError: first$",
    "scripts/quits.py": r"importing scripts/quits.py ended the program; .* if __name__ ==",
    "not-a-module": "'not-a-module' is neither a path that ends in .py nor the name of a module",
    "target_package:": "'target_package:' is no target; write path/to/file.py:name or",
    ":audit": "':audit' is no target",
    "target_package:not-a-name": "is no target",
}


@pytest.mark.parametrize("target", MISSING)
def test_the_part_that_is_missing_is_named(target, folder):
    with pytest.raises(BadUsage, match=MISSING[target]) as caught:
        load(target)
    assert "\n" not in str(caught.value)


def test_the_original_error_stays_behind_the_sentence(folder):
    with pytest.raises(BadUsage) as caught:
        load("scripts/broken.py")
    assert str(caught.value.__cause__) == "first\nsecond"


def test_the_arguments_that_a_function_needs_are_known():
    def function(a, b=1, *more, c, **rest):
        pass

    assert required(function) == ["a", "c"]
    assert required(lambda: None) == []
    assert required(dict.fromkeys) == ["iterable"]
    assert required(max) == []


def test_nothing_returned_is_refused():
    assert call("a.py:f", lambda: 1) == 1
    with pytest.raises(
        BadUsage, match=r"a.py:f returned None; it must return what is to be audited"
    ):
        call("a.py:f", lambda: None)


def test_what_the_users_code_raises_is_one_sentence():
    def failing():
        raise KeyError("name")

    with pytest.raises(BadUsage, match=r"^f\(\) raised KeyError: 'name'$"):
        guarded("f()", failing)
    with pytest.raises(ZeroDivisionError):
        raise guarded("f()", lambda: ZeroDivisionError())
    with pytest.raises(KeyboardInterrupt):
        guarded("f()", interrupted)


def interrupted():
    raise KeyboardInterrupt
