"""Which floating-point dtypes a program computes in, on the way from its inputs to its outputs."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOVES = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "optimization_barrier",
        "pad",
        "reduce_precision",
        "reshape",
        "rev",
        "select_n",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)
"""What moves or converts numbers and computes none: a cast alone rounds both sides alike."""


class Coarsest(NamedTuple):
    """The dtypes of the largest eps on the way from some inputs to the outputs; None for none.

    Attributes:
        computed: that anything is computed in.
        held: that any value has, those that are only moved or converted as well.
    """

    computed: np.dtype | None
    held: np.dtype | None


def coarsest(function: Callable[..., Any], own: Any, *others: Any) -> Coarsest:
    """The coarsest dtypes that a function of the arrays `own` goes through.

    What depends on none of them, such as the random bits of a dropout mask, does not count.
    """
    closed = jax.make_jaxpr(function)(own, *others)
    jaxpr = closed.jaxpr
    count = len(jax.tree.leaves(own))
    computed: set[np.dtype] = set()
    held: set[np.dtype] = set()
    _follow(jaxpr, set(jaxpr.invars[:count]), computed, held)
    return Coarsest(*(max(found, key=_eps, default=None) for found in (computed, held)))


def _eps(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def _follow(jaxpr: Any, reached: set[Any], computed: set[np.dtype], held: set[np.dtype]) -> None:
    """Adds what comes of the variables `reached`, which grow to all that depend on them."""
    for equation in jaxpr.eqns:
        inputs = [variable for variable in equation.invars if not hasattr(variable, "val")]
        if not reached.intersection(inputs):
            continue
        inside_of = programs(equation.params.values())
        for inner in inside_of:
            inside = set(inner.invars)
            if len(inner.invars) == len(equation.invars):
                inside = {
                    own
                    for own, outer in zip(inner.invars, equation.invars, strict=True)
                    if not hasattr(outer, "val") and outer in reached
                }
            _follow(inner, inside, computed, held)
        for variable in equation.outvars:
            reached.add(variable)
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                continue
            held.add(jnp.dtype(dtype))
            if not inside_of and equation.primitive.name not in MOVES:
                computed.add(jnp.dtype(dtype))


def programs(values: Iterable[Any]) -> list[Any]:
    """The programs inside of an equation: of a loop, a branch, a jitted call."""
    found = []
    for value in values:
        if isinstance(value, tuple | list):
            found += programs(value)
        elif hasattr(value, "eqns"):
            found.append(value)
        elif hasattr(value, "jaxpr"):
            found.append(value.jaxpr)
    return found
