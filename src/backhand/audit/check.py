"""The full audit of one hand-written gradient."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.accuracy import gradients
from backhand.audit.cost import Programs, cost
from backhand.audit.inputs import no_failing_callbacks, no_side_effects
from backhand.audit.properties import CHECKS, properties, purity
from backhand.audit.result import Audit, Finding, Leaf
from backhand.audit.runs import Runs
from backhand.audit.subjects import subject_of
from backhand.audit.taylor import taylor
from backhand.protocol import listed, suggestion
from backhand.visit import PyTree

SKIPPABLE = frozenset({"accuracy", "taylor", *CHECKS})
"""What an audit may be asked to leave out; not values and gradients themselves."""


def check(
    subject: Any,
    *args: PyTree,
    reference: Callable[..., PyTree] | None = None,
    name: str | None = None,
    side: Mapping[str, Any] | None = None,
    seed: int = 0,
    costs: bool = True,
    skip: Collection[str] = (),
    hold: Collection[str] = (),
) -> Audit:
    """Shows a backward pass right, or says which leaf is wrong, and how.

    The truth is JAX's own gradient of a reference in float64. Each leaf of each argument is set
    beside it under several random cotangents, element by element; then in float32, bfloat16 and
    float16 beside what autodiff gives there. A Taylor test holds both gradients against their
    functions' values, so that a wrong reference is found too. Shapes, dtypes, purity, jit, vmap,
    NaN and Inf, empty batches, second derivatives and costs follow.

    Args:
        subject: a `bh.Op` (bind its settings first), a `bh.Layer`, a `bh.Objective`, a row of the
            catalogue, a `jax.custom_vjp` function, or any function that JAX differentiates.
        args: of an op or a function its arguments; of a layer `(params, x)`; of an objective
            `(params, batch)`; of a row none. Arrays of floating point are differentiated. Integers,
            booleans and keys are not; what is no array, a Python number too, is a setting.
        reference: a plain function of the same arguments, in the textbook form. By default an op's
            own, a layer's or an objective's forward, a `jax.custom_vjp` function's primal code.
            Another function without one is held against its values alone.
        name: what the audit calls it.
        side: side inputs of a layer or an objective: `{"key": key, "training": True}`.
        seed: of the random cotangents.
        costs: False leaves out the measurement of costs.
        skip: checks that do not count, such as "nonfinite" for a rule that never meets a NaN, or
            "second derivative" for one that is never differentiated, "taylor" for one that is not
            the derivative by design: see `SKIPPABLE`.
        hold: arguments, or leaves of them by path, that are not differentiated though they are of
            floating point: `hold=("mask",)`.

    Returns:
        An audit: print it, or call its `assert_passed()` or `to_dict()`.

    Raises:
        TypeError: for what cannot be audited, in one sentence, before anything compiles: no
            function, no gradient, other arguments than it takes, complex numbers, lists.
        ValueError: for a reference whose output has another tree or other shapes, or a check to
            skip or an argument to hold that there is not.

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> @jax.custom_vjp
        ... def square(x):
        ...     return x * x
        >>> square.defvjp(lambda x: (x * x, x), lambda x, dy: (3 * x * dy,))
        >>> audit = bh.check(square, jnp.array([1.0, 2.0, -3.0]), costs=False)
        >>> audit.passed
        False
        >>> print(audit.leaves[0].path, audit.leaves[0].cause.kind)
        x factor
    """
    skip = (skip,) if isinstance(skip, str) else skip
    for unknown in sorted(set(skip) - SKIPPABLE):
        advice = suggestion(unknown, SKIPPABLE) or f"; there are {listed(SKIPPABLE)}"
        raise ValueError(f"there is no check {unknown!r} to skip{advice}")
    if not hasattr(seed, "__index__") or seed < 0:
        raise ValueError(f"seed must be an integer, 0 or more, got {seed!r}")
    runs = Runs(subject_of(subject, args, reference, name, side, hold), seed)
    # A constant of the subject may be in float32 where the arguments are not.
    with (
        no_side_effects(runs.subject.name),
        no_failing_callbacks(runs.subject.name),
        jax.numpy_dtype_promotion("standard"),
        Programs(runs) if costs else contextlib.nullcontext() as programs,
    ):
        pure = list(purity(runs))
        if "purity" not in skip and not all(found.passed for found in pure):
            return Audit(runs.subject.name, (), (*pure, *_not_judged()))
        leaves, findings = gradients(runs)
        findings += taylor(runs)
        findings += pure + properties(runs, all(leaf.agrees for leaf in leaves))
        findings += _point(runs)
        measured = cost(runs, programs) if programs is not None else None
    leaves, findings = _without_blame(leaves, findings)
    # What explains other failures comes first.
    findings.sort(key=lambda found: found.passed or found.check not in ("purity", "structure"))
    findings = [
        dataclasses.replace(found, passed=True, skipped=True, message="left out on request")
        if found.check in skip
        else found
        for found in findings
    ]
    order = {path: place for place, path in enumerate(runs.subject.order)}
    leaves.sort(key=lambda leaf: order.get(leaf.path, len(order)))
    return Audit(runs.subject.name, tuple(leaves), tuple(findings), measured)


def _point(runs: Runs) -> list[Finding]:
    """A note on what this point cannot show: to forget a factor of 1, or a term of 0, is right."""
    numbers = zip(runs.subject.paths, runs.subject.at(jnp.float32)[0], strict=True)
    alike = {path: np.unique(np.asarray(leaf)) for path, leaf in numbers if leaf.size > 1}
    constant = [f"{p} is {v[0]:g}" for p, v in alike.items() if len(v) == 1 and v[0] in (0, 1)]
    if not constant:
        return []
    why = f"{', '.join(constant)} everywhere: what a rule forgets of it may not show here; audit "
    return [Finding("point", "", True, f"{why}it with random numbers too", skipped=True)]


def _not_judged() -> list[Finding]:
    """What is not to be judged of a function that is not pure."""
    why = "not judged: the function is not pure"
    checks = ("value", "gradient", "accuracy", "taylor", *CHECKS)
    return [Finding(check, "", True, why, skipped=True) for check in checks if check != "purity"]


def _without_blame(leaves: list[Leaf], findings: list[Finding]) -> tuple[list[Leaf], list[Finding]]:
    """A leaf whose gradient the values confirm is not wrong: then the reference's is."""
    slopes = [found for found in findings if found.check == "taylor" and not found.skipped]
    wrong = {(f.path, f.message.startswith("the reference's")) for f in slopes if not f.passed}
    confirmed = {path for path, whose in wrong if whose and (path, False) not in wrong}
    why = "the values confirm this gradient: the reference's is wrong"

    def judged(found: Finding) -> Finding:
        if found.passed or not confirmed or found.check not in ("gradient", "nonfinite"):
            return found
        if found.check == "nonfinite":
            return dataclasses.replace(found, passed=True, skipped=True, message=why)
        return (
            dataclasses.replace(found, message=why, cause=None)
            if found.path in confirmed
            else found
        )

    cleared = [dataclasses.replace(x, cause=None) if x.path in confirmed else x for x in leaves]
    return cleared, [judged(found) for found in findings]
