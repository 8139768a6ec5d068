"""Fixtures that any test may ask for, and which tests run on one version alone."""

import contextlib
import functools
import gc
from pathlib import Path

import jax
import jaxtyping
import pytest

COMPILATION = "/jax/core/compile/backend_compile_duration"

# What another version of JAX may change, and so runs on the newest too: the gradient of every row
# and its sharding, the step, the audit from end to end, and all that a user reads, runs or calls
# JAX with. Beside them the doctests run, one for each public name.
ON_BOTH = [
    "audit/selftest/test_end_to_end.py",
    "benchmarks",
    "cli",
    "conformance",
    "examples",
    "test_accumulate.py",
    "test_arrays.py",
    "test_differentiable.py",
    "test_foreign.py",
    "test_gradients.py",
    "test_layout.py",
    "test_notebooks.py",
    "test_protocol.py",
    "test_pytest_backhand.py",
    "test_readme.py",
    "training/test_step.py",
]


@functools.cache
def runs_on_both(path):
    """Whether a file is outside of the tests, or in what runs on both versions."""
    own, tests = Path(path), Path(__file__).parent
    return tests not in own.parents or any(tests / part in (own, *own.parents) for part in ON_BOTH)


def params(item):
    """What a test is parametrized with, by name."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def one_row_after_the_other(items):
    """Tests of a row in `conformance` follow each other: one process makes what they share."""
    rows = {
        place: repr(params(item)["row"])
        for place, item in enumerate(items)
        if item.path.parent.name == "conformance" and "row" in params(item)
    }
    for place, item in zip(rows, [items[p] for p in sorted(rows, key=rows.get)], strict=True):
        items[place] = item


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Drawn examples are many programs to compile, and show the same on any version of JAX."""
    one_row_after_the_other(items)
    for item in items:
        drawn = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if drawn or not runs_on_both(item.path):
            item.add_marker("oldest_only")


def pytest_collection_finish():
    """What was imported stays: the collector of garbage need not look through it again."""
    gc.freeze()


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def nothing_compiles():
    """A context in which it is an error that XLA compiles anything."""

    @contextlib.contextmanager
    def context():
        compiled = []

        def listen(event, duration, **details):
            if event == COMPILATION:
                compiled.append(details.get("fun_name", "a function"))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert not compiled, f"compiled: {compiled}"

    return context


@pytest.fixture
def unchecked():
    """Calls are not checked against the signatures, as they are not for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
