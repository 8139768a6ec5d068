"""One case per op and setting, against autodiff and, where installed, PyTorch."""

import importlib
import pkgutil
from collections.abc import Iterator

from benchmarks.ops.case import Case

APART = ("__main__", "case", "errors", "peer", "table")
"""The modules that have no cases."""


def cases() -> Iterator[Case]:
    """The cases of every other module here; none of them has made its arguments yet."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if module.name not in APART:
            yield from importlib.import_module(f"{__name__}.{module.name}").cases()
