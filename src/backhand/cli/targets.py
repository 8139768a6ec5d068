"""From what is written on the command line to the Python object that it names."""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from backhand.protocol import suggestion

DEFAULT = "audit"
"""The name that is taken where a target has none."""


class BadUsage(Exception):
    """What was asked for cannot be done; says in one sentence why, and what to do."""


def load(target: str) -> Any:
    """The object that a target names.

    Args:
        target: `path/to/file.py:name` or `package.module:name`, the name `audit` if left out. A
            file is imported as Python runs a script, with its own folder to import from; a module
            with the working directory.

    Raises:
        BadUsage: naming the part that was not found, and the closest that was.

    Example:
        >>> load("math:sqrt")(4.0)
        2.0
    """
    place, name = _split(target)
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _of_file(Path(place)) if is_file else _of_module(place)
    return _attribute(module, place, name)


def required(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a function cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of functions written in C
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def call(target: str, function: Callable[[], Any]) -> Any:
    """What a function without arguments gives.

    Raises:
        BadUsage: if it raises, or gives nothing.
    """
    result = guarded(f"{target}()", function)
    if result is None:
        raise BadUsage(
            f"{target} returned None; it must return what is to be audited, as in "
            "`return function, *arguments`"
        )
    return result


def guarded(what: str, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """A call of the user's code; what it raises becomes one sentence, the original behind it.

    Raises:
        BadUsage: if it raises, or ends the program.
    """
    try:
        return function(*args, **given)
    except BadUsage:
        raise
    except SystemExit as error:
        raise BadUsage(
            f"{what} ended the program; what is to run only as a script belongs under "
            'if __name__ == "__main__":'
        ) from error
    except Exception as error:
        lines = str(error).strip().splitlines() or ["without a message"]
        raise BadUsage(f"{what} raised {type(error).__name__}: {lines[0].rstrip()}") from error


def _split(target: str) -> tuple[str, str]:
    place, colon, name = target.rpartition(":")
    if not colon or "/" in name or "\\" in name:  # the colon of a drive
        return target, DEFAULT
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise BadUsage(
            f"{target!r} is no target; write path/to/file.py:name or package.module:name"
        )
    return place, name


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadUsage(_missing(path))
    if path.suffix != ".py":
        raise BadUsage(f"{path} is no Python file; its name must end in .py")
    module: ModuleType = guarded(f"importing {path}", _run, path.resolve())
    return module


@functools.cache
def _run(path: Path) -> ModuleType:
    """A file as a module, run once however often it is named."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"backhand_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _missing(path: Path) -> str:
    """Which part of a path does not exist, and what is there instead."""
    if path.is_dir():
        return f"{path} is a folder; name a file in it"
    first = next(part for part in [*reversed(path.parents), path] if not part.exists())
    known = [each.name for each in first.parent.iterdir()] if first.parent.is_dir() else []
    return f"there is no {first.name!r} in {first.parent.absolute()}{suggestion(first.name, known)}"


def _of_module(dotted: str) -> ModuleType:
    if not all(part.isidentifier() for part in dotted.split(".")):
        raise BadUsage(f"{dotted!r} is neither a path that ends in .py nor the name of a module")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module, sofar = None, ""
    for part in dotted.split("."):
        inside, sofar = sofar, f"{sofar}.{part}".lstrip(".")
        try:
            module = guarded(f"importing {sofar}", importlib.import_module, sofar)
        except BadUsage as error:
            original = error.__cause__
            if not isinstance(original, ModuleNotFoundError) or original.name != sofar:
                raise
            raise BadUsage(_no_module(part, inside, module)) from original
    assert module is not None
    return module


def _no_module(part: str, inside: str, parent: ModuleType | None) -> str:
    """A sentence for a module that is not in `parent`, or not anywhere."""
    if parent is not None and hasattr(parent, part):
        return f"{part!r} is no module, but a name in {inside}; write {inside}:{part}"
    if parent is not None and not hasattr(parent, "__path__"):
        return f"{inside} is a module without others in it; a name in it is {inside}:name"
    known = {each.name for each in pkgutil.iter_modules(parent and parent.__path__)}
    where = f"{inside} has no module {part!r}" if inside else f"there is no module {part!r}"
    advice = "; run where it can be imported, or name its file, as in path/to/file.py:name"
    return where + (suggestion(part, known) or ("" if inside else advice))


def _attribute(module: ModuleType, place: str, name: str) -> Any:
    found, sofar = module, place
    for part in name.split("."):
        if not hasattr(found, part):
            known: Collection[str] = [each for each in dir(found) if not each.startswith("_")]
            advice = suggestion(part, known)
            if name == DEFAULT:  # nobody wrote it
                advice = f"; name what to audit, as in {place}:name"
            raise BadUsage(f"{sofar} has no {part!r}{advice}")
        found = getattr(found, part)
        sofar = f"{place}:{name}"
    return found
