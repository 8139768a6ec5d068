"""Whether cotangents have the shapes, dtypes and trees of their primals."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from backhand.arrays import is_floating
from backhand.audit.inputs import first_sentence
from backhand.audit.result import Finding
from backhand.audit.runs import Runs
from backhand.audit.subject import Leaves, floating_leaves
from backhand.protocol import Op


def structure(runs: Runs) -> Iterator[Finding]:
    """Shapes, dtypes and trees of the cotangents, as the rule itself gives them."""
    if runs.subject.rule is None:
        why = "JAX itself gives the cotangents their shapes and dtypes; there is no rule to see"
        yield Finding("structure", "", True, why, skipped=True)
        return
    faults = structure_faults(runs, "float32") or _refusal(runs)
    lower = [] if faults or runs.level != jnp.float64 else structure_faults(runs, "bfloat16")
    if any(is_floating(leaf) and leaf.dtype.itemsize < 4 for leaf in runs.subject.leaves):
        faults, lower = faults + lower, []
    for path, message in faults:
        yield Finding("structure", path, False, message)
    for path, message in lower:
        advice = f"{message}; it counts where an argument is less than float32"
        yield Finding("structure", path, True, advice, skipped=True)
    if not faults:
        right = "every cotangent has the shape and dtype of its primal; integers and keys have none"
        yield Finding("structure", "", True, right)


def _refusal(runs: Runs) -> list[tuple[str, str]]:
    """Why `jax.vjp` does not take a rule that runs by itself, as for residuals of text."""
    if not isinstance(runs.subject.function, Op | jax.custom_vjp):
        return []  # JAX runs the forward of a layer, not the rule
    own, rest = runs.subject.shaped(jnp.float32)

    def gradient(own: Leaves, rest: Leaves) -> Any:
        function, rebuild = runs.subject.function, runs.subject.rebuild
        y, pull = jax.vjp(lambda own: floating_leaves(function(*rebuild(own, rest))), own)
        return pull([jnp.ones_like(leaf) for leaf in y])

    try:
        jax.eval_shape(gradient, own, rest)
    except Exception as error:
        return [("", f"jax.grad does not take the rule: {first_sentence(error)}")]
    return []


def structure_faults(runs: Runs, dtype: str) -> list[tuple[str, str]]:
    """By path, what is odd in the cotangents that the rule gives in a dtype.

    Nothing where the subject does not run in bfloat16.
    """
    own, rest = runs.subject.at(dtype)
    seen: list[tuple[str, str]] = []

    def trace(own: Leaves, rest: Leaves) -> None:
        y = jax.tree.leaves(runs.subject.function(*runs.subject.rebuild(own, rest)))
        dy = [jnp.zeros_like(leaf) for leaf in y if is_floating(leaf)]
        seen.extend(runs.subject.reverse(own, rest, dy)[2])

    try:
        jax.eval_shape(trace, own, rest)
    except Exception:
        if dtype == "float32":
            raise
    return list(dict.fromkeys(seen))
