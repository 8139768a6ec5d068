"""The package keeps its shape: who imports whom, how long a file is, and that each has its test."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "backhand"

MAXIMUM_LINES = 400

# Which parts of the package each part may import, besides itself. A part is a file or a folder
# directly under src/backhand. Arrows point strictly downwards.
ALLOWED: dict[str, set[str]] = {
    "arrays": set(),
    "bounds": set(),
    "recent": set(),
    "contributions": {"arrays"},
    "visit": {"arrays", "contributions"},
    "protocol": {"arrays", "contributions", "visit"},
    "ops": {"arrays", "bounds", "contributions", "protocol", "visit"},
    "losses": {"arrays", "contributions", "ops", "protocol", "visit"},
    "metrics": {"arrays", "losses"},
    "layers": {"arrays", "contributions", "ops", "protocol", "visit"},
    "combinators": {"arrays", "contributions", "protocol", "visit"},
    "batch": {"protocol", "visit"},
    "gradients": {
        "arrays",
        "batch",
        "bounds",
        "contributions",
        "metrics",
        "protocol",
        "recent",
        "visit",
    },
    "differentiable": {"protocol", "visit"},
    "blocks": {"arrays", "contributions"},
    "waiting": {"arrays", "blocks", "contributions", "visit"},
    "carried": {"arrays", "blocks", "contributions", "visit", "waiting"},
    "micro_batches": {"arrays", "blocks", "carried", "contributions", "visit", "waiting"},
    "foreign": {"arrays", "gradients", "metrics", "micro_batches", "protocol", "visit"},
    "collectors": {"arrays", "contributions", "protocol", "visit"},
    "catalogue": {
        "arrays",
        "combinators",
        "contributions",
        "layers",
        "losses",
        "ops",
        "protocol",
        "visit",
    },
    "audit": {
        "arrays",
        "catalogue",
        "collectors",
        "combinators",
        "contributions",
        "differentiable",
        "gradients",
        "protocol",
        "visit",
    },
    "accumulator": {
        "accumulate",
        "arrays",
        "carried",
        "foreign",
        "gradients",
        "metrics",
        "micro_batches",
        "protocol",
        "recent",
        "visit",
        "waiting",
    },
    "combine": {"arrays", "gradients", "metrics", "protocol", "visit"},
    "linear_cross_entropy_objective": {
        "arrays",
        "combinators",
        "contributions",
        "gradients",
        "losses",
        "ops",
        "protocol",
        "visit",
    },
    "testing": set(),
    "clipping": {
        "arrays",
        "collectors",
        "contributions",
        "gradients",
        "metrics",
        "protocol",
        "visit",
    },
    "accumulate": {
        "arrays",
        "contributions",
        "foreign",
        "gradients",
        "metrics",
        "micro_batches",
        "protocol",
        "visit",
        "waiting",
    },
    "training": {
        "accumulate",
        "clipping",
        "arrays",
        "collectors",
        "contributions",
        "gradients",
        "metrics",
        "micro_batches",
        "protocol",
        "recent",
        "visit",
    },
    "models": {"combinators", "layers", "losses", "protocol", "visit"},
    "data": set(),
}

# These may import every part, and the public names of `backhand` itself.
IMPORT_EVERYTHING = {"__main__", "cli", "plots"}

# What is installed with the package. Everything else is optional: imported where it is used.
ARRAY_LIBRARIES = {"chex", "jax", "jaxlib"}
CORE = ARRAY_LIBRARIES | {"jaxtyping", "numpy"}
IMPORT_OPTAX = {"cli", "training"}
IMPORT_NO_ARRAY_LIBRARY = {"data"}

# Files without a test of the same name, as paths under src/backhand: those that the tests
# which read the catalogue cover in full.
WITHOUT_OWN_TEST: set[str] = set()

SOURCES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    """The path under src/backhand, with forward slashes."""
    return path.relative_to(PACKAGE).as_posix()


def imports(source: str, file: str) -> Iterator[tuple[str, bool, int]]:
    """Every import of a file under src/backhand: dotted name, whether it is late, and line.

    A late import runs when a function is called, or never (for type checkers only).
    """
    folder = ["backhand", *Path(file).parent.parts]

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, late, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", late, node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, late)
        else:
            late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, late)

    yield from walk(ast.parse(source), False)


def forbidden_imports(source: str, file: str) -> list[str]:
    """What the source of the file at that path under src/backhand imports and may not."""
    part = Path(file).parts[0].removesuffix(".py")
    if part not in ALLOWED and part not in IMPORT_EVERYTHING:
        return [f"{part} is a new part of the package: say in ALLOWED what it may import"]

    def reason(name: str, late: bool) -> str | None:
        library, *rest = name.split(".")
        if library == "backhand":
            if part in IMPORT_EVERYTHING or (rest and rest[0] in ALLOWED[part] | {part}):
                return None
            return f"{part} may import only {sorted(ALLOWED[part]) or 'nothing'} of backhand"
        if library in sys.stdlib_module_names:
            return None
        if part in IMPORT_NO_ARRAY_LIBRARY and library in ARRAY_LIBRARIES | {"optax"}:
            return f"{part} is free of {library}"
        if library == "optax":
            return None if part in IMPORT_OPTAX else f"only {sorted(IMPORT_OPTAX)} import optax"
        if library not in CORE and not late:
            return f"{library} is optional: import it in the function that uses it"
        return None

    return [
        f"{file}:{line} imports {name}: {why}"
        for name, late, line in imports(source, file)
        if (why := reason(name, late))
    ]


def test_imports_point_downwards():
    found = []
    for path in SOURCES:
        if path != PACKAGE / "__init__.py":
            found += forbidden_imports(path.read_text(encoding="utf-8"), relative(path))
    assert not found, "\n".join(found)


def test_allowed_arrows_have_no_cycle():
    remaining = dict(ALLOWED)
    while remaining:
        bottom = {part for part, below in remaining.items() if not below & remaining.keys()}
        assert bottom, f"a cycle among {sorted(remaining)}"
        for part in bottom:
            del remaining[part]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("protocol.py", "from backhand.layers import dense"),
        ("protocol.py", "import backhand.layers.linear as linear"),
        ("protocol.py", "from backhand import contributions, ops"),
        ("protocol.py", "import backhand"),
        ("protocol.py", "import backhand as bh"),
        ("gradients.py", "from .losses import regression"),
        ("ops/linear.py", "from ..layers.linear import dense"),
        ("ops/__init__.py", "from ..gradients import grad"),
        ("ops/linear.py", "def f():\n    from backhand import gradients"),
        ("ops/linear.py", "if TYPE_CHECKING:\n    from backhand.gradients import grad"),
        ("gradients.py", "def f():\n    import optax"),
        ("models/gpt.py", "from optax import adamw"),
        ("data/batches.py", "import jax.numpy as jnp"),
        ("data/batches.py", "def f():\n    from backhand.arrays import cast"),
        ("plots.py", "import matplotlib.pyplot as plt"),
        ("plots.py", "try:\n    import matplotlib\nexcept ImportError:\n    matplotlib = None"),
        ("cli.py", "from tqdm import tqdm"),
        ("data/sources.py", "from sklearn.datasets import load_digits"),
        ("unheard_of.py", "import math"),
    ],
)
def test_a_forbidden_import_is_caught(file, source):
    assert len(forbidden_imports(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("protocol.py", "import functools, jax\nfrom jax import lax\nfrom jaxtyping import Array"),
        ("protocol.py", "from backhand import contributions\nfrom .contributions import Outer"),
        ("ops/__init__.py", "from backhand.ops.linear import linear\nfrom .linear import linear"),
        ("ops/pooling.py", "from . import windows\nfrom ..protocol import Op"),
        ("training/state.py", "import optax\nfrom backhand.accumulate import accumulate"),
        ("data/sources.py", "import numpy\ndef f():\n    from sklearn.datasets import load_digits"),
        ("plots.py", "import backhand as bh\ndef f():\n    import matplotlib.pyplot"),
        ("plots.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("cli.py", "import optax\nfrom backhand import models, training"),
    ],
)
def test_an_allowed_import_passes(file, source):
    assert forbidden_imports(source, file) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_holds_one_concept(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAXIMUM_LINES, f"{relative(path)} has {lines} lines: split it by concept"


def own_test(file: str) -> Path:
    """Where the test of the file at that path under src/backhand is."""
    return ROOT / "tests" / Path(file).with_name(f"test_{Path(file).name}")


def test_every_file_has_its_test():
    files = {relative(path) for path in SOURCES if path.name != "__init__.py"}
    missing = {file for file in files - WITHOUT_OWN_TEST if not own_test(file).exists()}
    assert not missing, "no " + ", ".join(
        own_test(file).relative_to(ROOT).as_posix() for file in sorted(missing)
    )
    stale = {file for file in WITHOUT_OWN_TEST if file not in files or own_test(file).exists()}
    assert not stale, f"not exceptions any more: {sorted(stale)}"
