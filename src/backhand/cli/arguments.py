"""Random arrays, from what is written on the command line: `f32[4,8]`."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.cli.targets import BadUsage
from backhand.protocol import Layer, suggestion
from backhand.visit import Params, PyTree

DTYPES = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "bool": "bool",
}
"""By the short names that JAX prints; the long ones are taken too."""

_FORM = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\](<(?P<below>\d+))?")


def array(text: str, rng: np.random.Generator) -> Any:
    """A random array of a dtype and shape.

    Args:
        text: `f32[4,8]`; of integers also how far they reach, `i32[4]<10`, by default below 2. A
            random key is `key`.
        rng: where numbers come from: floating-point ones are normal.

    Raises:
        BadUsage: for another form, an unknown dtype, or one that is not switched on.

    Example:
        >>> array("f32[4,8]", np.random.default_rng(0)).shape
        (4, 8)
    """
    if text == "key":
        return jax.random.key(int(rng.integers(2**31)))
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise BadUsage(
            f"--arg {text!r} is no dtype and shape; write f32[4,8], i32[4]<10 for integers below "
            "10, or key"
        )
    known = {**DTYPES, **{name: name for name in DTYPES.values()}}
    if form["dtype"] not in known:
        close = suggestion(form["dtype"], known) or f"; the dtypes are {', '.join(DTYPES)}"
        raise BadUsage(f"--arg {text!r}: there is no dtype {form['dtype']!r}{close}")
    dtype = np.dtype(jnp.dtype(known[form["dtype"]]))
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise BadUsage(
            f"--arg {text!r}: JAX has no 64-bit numbers unless JAX_ENABLE_X64=1 is set; the audit "
            "computes the truth in float64 whatever the arguments are, so give 32 bits"
        )
    shape = tuple(int(n) for n in form["shape"].split(",") if n.strip())
    if jnp.issubdtype(dtype, jnp.floating):
        if form["below"] is not None:
            raise BadUsage(f"--arg {text!r}: only integers have a border, as in i32[4]<10")
        return jnp.asarray(rng.normal(size=shape), dtype)
    below = 2 if form["below"] is None else int(form["below"])
    if below < 1 or (dtype != np.bool_ and below - 1 > np.iinfo(dtype).max):
        raise BadUsage(f"--arg {text!r}: there are no {dtype} numbers from 0 to below {below}")
    return jnp.asarray(rng.integers(0, below, shape), dtype)


def arrays(texts: Sequence[str], seed: int) -> list[Any]:
    """An array for each text, from one seed."""
    rng = np.random.default_rng(seed)
    return [array(text, rng) for text in texts]


def parameters(layer: Layer, x: PyTree, seed: int) -> Params:
    """Parameters of a layer for an input, moved away from where they begin.

    Zeros and ones hide mistakes: a bias of 0, a scale of 1.
    """
    rng = np.random.default_rng((seed, 1))

    def moved(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Squares, so that a variance stays positive.
        return jnp.asarray(np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape) ** 2, leaf.dtype)

    return jax.tree.map(moved, layer.init(jax.random.key(seed), x))
