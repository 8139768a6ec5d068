"""Settings of every test and doctest, made before JAX is imported, which reads them then."""

import functools
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

if loaded := {"jax", "backhand"} & sys.modules.keys():
    raise RuntimeError(
        f"{', '.join(sorted(loaded))} must be imported after the settings in conftest.py, but is "
        "imported already; remove the pytest plugin or start-up file that imports it"
    )


def _add_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _known_to_xla(flag: str) -> bool:
    """Whether XLA starts with the flag: one that it does not know ends the process."""
    start = "from jaxlib import xla_client; xla_client.CompileOptions()"
    run = subprocess.run(
        [sys.executable, "-c", start], env={**os.environ, "XLA_FLAGS": flag}, capture_output=True
    )
    return run.returncode == 0


# Eight devices on any machine, so that meshes and collectives are tested everywhere.
_add_flag("--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The time of most tests is that of XLA compiling a program of a few numbers. To compile it badly,
# without a compiler for each kernel, takes less than half as long. Workers inherit this.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    for flag in (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ):
        if _known_to_xla(flag):
            _add_flag(flag)

# A silent promotion of dtypes or ranks is a bug in a backward pass.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Compiled functions are kept between runs (a second run of the same code is several times faster).
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Figures are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
from hypothesis import settings
from jax._src.interpreters import mlir
from jaxtyping import install_import_hook

from tests.signatures import check

# Every call in a test checks the shapes and dtypes in the signatures that it passes through.
install_import_hook("backhand", f"{check.__module__}.{check.__name__}")

# Before 0.12 JAX made a context of MLIR for each program, which took more time than all else that
# lowering a small one does. As many programs share one here.
if jax.__version_info__ < (0, 12):
    programs = itertools.count()
    context = functools.lru_cache(1)(lambda number, make=mlir.make_ir_context: make())
    mlir.make_ir_context = lambda: context(next(programs) // 100)

# A trace makes many objects and no garbage in cycles; to look for it after every 700 takes a tenth
# of the time of the tests.
gc.set_threshold(50_000, 20, 50)

# The same examples on every run; compilation makes the time of one example meaningless.
settings.register_profile("backhand", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("backhand")
