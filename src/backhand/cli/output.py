"""What a command leaves behind: text, JSON, a page."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backhand.audit.result import plain
from backhand.cli.targets import BadUsage

STANDARD_OUTPUT = "-"


def check_writable(option: str, name: str | None) -> None:
    """Refuses a file that cannot be written, before any work is done.

    Raises:
        BadUsage: saying why.
    """
    if name is None or name == STANDARD_OUTPUT:
        return
    path = Path(name)
    if path.is_dir():
        raise BadUsage(f"{option} needs the name of a file, got the folder {path}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadUsage(f"{option} {path} can't be written: {error.strerror or error}") from error


def write_lines(text: str) -> None:
    """Prints text; a reader that has gone, such as `head`, changes nothing of the verdict."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(name: str, values: Mapping[str, Any]) -> None:
    """Writes JSON, to standard output for "-"; a number that is not finite as "inf" or "nan"."""
    text = json.dumps(plain(values), indent=2, allow_nan=False) + "\n"
    if name == STANDARD_OUTPUT:
        write_lines(text.rstrip("\n"))
    else:
        write_text(name, text)


def write_text(name: str, text: str) -> None:
    """Writes the whole file or, if interrupted, nothing of it."""
    path = Path(name)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
