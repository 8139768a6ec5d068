"""Settings of every test and doctest, made before JAX is imported, which reads them then."""

import os
import sys
from pathlib import Path

if loaded := {"jax", "backhand"} & sys.modules.keys():
    raise RuntimeError(
        f"{', '.join(sorted(loaded))} must be imported after the settings in conftest.py, but is "
        "imported already; remove the pytest plugin or start-up file that imports it"
    )

# Eight devices on any machine, so that meshes and collectives are tested everywhere.
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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

from hypothesis import settings
from jaxtyping import install_import_hook

# Every call in a test checks the shapes and dtypes in the signatures that it passes through.
install_import_hook("backhand", "beartype.beartype")

# The same examples on every run; compilation makes the time of one example meaningless.
settings.register_profile("backhand", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("backhand")
