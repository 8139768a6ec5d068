"""Fixtures that any test may ask for, and which tests run on one version alone."""

import contextlib

import jax
import jaxtyping
import pytest

COMPILATION = "/jax/core/compile/backend_compile_duration"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Drawn examples are many programs to compile, and show the same on any version of JAX."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("oldest_only")


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
