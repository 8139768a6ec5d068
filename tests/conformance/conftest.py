"""Settings of the tests that read the catalogue."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_quickly():
    """To compile a program of a few numbers well takes longer than to run it badly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
