"""Leaf by leaf: is the gradient right in float64, and as accurate as autodiff below it?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from backhand.audit.diagnosis import diagnose
from backhand.audit.diagnosis.pair import Arrays as Named
from backhand.audit.diagnosis.pair import Context
from backhand.audit.gradient import Rounding, Verdict, errors, judge, relative_errors, spared
from backhand.audit.inputs import first_sentence
from backhand.audit.paths import NONE, Mistakes
from backhand.audit.result import Cause, Finding, Leaf
from backhand.audit.runs import Arrays, Runs, compiled
from backhand.audit.subject import LOW, Leaves, Subject
from backhand.visit import PyTree

EVERY = ("float32", *LOW)

MOST_ELEMENTS = 10**7
"""Of the gradients, over all mistakes that are tried."""


def gradients(runs: Runs) -> tuple[list[Leaf], list[Finding]]:
    """Each leaf's record, and what is found of values, gradients and accuracy.

    Without a reference there is nothing to compare with: the leaves hold our own gradient.
    """
    subject = runs.subject
    if not runs.has_reference:
        run = runs.at(jnp.float32 if runs.refused else jnp.float64)
        why = "there is no reference to compare with; give reference=, a plain function"
        leaves = [_leaf(runs, i, run.ours[i], run.ours[i], None) for i in range(len(subject.paths))]
        checks = ("value", "gradient", "accuracy")
        return leaves, [Finding(check, "", True, why, skipped=True) for check in checks]
    _check_finite(runs)
    findings = list(_values(runs))
    if subject.note:
        findings.append(Finding("reference", "", True, subject.note))
    if runs.level == jnp.float64 and _rounds(runs):
        runs.rounds = jnp.dtype(jnp.float32)
    level = runs.level.name
    low, truth32 = runs.at(jnp.float32), runs.truth(jnp.float32).automatic
    if runs.level == jnp.float64:
        ours, truth = runs.at(jnp.float64).ours, runs.at(jnp.float64).automatic
    else:
        ours, truth = low.ours, truth32
        rule = "its rule" if runs.rounds is not None else "it"
        why = runs.refused or f"{rule} computes in {level} whatever it is given"
        message = f"{why}; so {level} is what it is judged in"
        findings.append(Finding("float64", "", True, message, skipped=True))
    sides = Sides(ours, truth, low.ours, low.automatic, truth32)
    verdicts = verdicts_on(
        subject.paths, sides, runs.level, Rounding(runs.length, None, runs.nearby)
    )
    known, leaves = context(runs), list[Leaf]()
    pairs = dict(zip(subject.paths, zip(ours, truth, strict=True), strict=True))
    accuracy = _low(runs, level, findings)
    for i, (path, verdict) in enumerate(zip(subject.paths, verdicts, strict=True)):
        cause = None if verdict.agrees else cause_of(path, pairs, verdict, known)
        leaf = _leaf(runs, i, ours[i], truth[i], verdict, cause)
        low_verdicts = {dtype: verdicts[i] for dtype, (verdicts, _) in accuracy.items()}
        wrong = [dtype for dtype, low in low_verdicts.items() if not low.agrees]
        sizes = {dtype: pair[i] for dtype, (_, pair) in accuracy.items()}
        leaves.append(dataclasses.replace(leaf, agrees=verdict.agrees and not wrong, errors=sizes))
        findings.append(_gradient(leaf, verdict, level))
        if verdict.agrees and (np.isnan(leaf.truth) & np.isfinite(leaf.ours)).any():
            why = "autodiff of the reference gives NaN here, where ours is finite: no mistake"
            findings.append(Finding("gradient", path, True, why))
        if verdict.agrees:
            findings += [
                Finding(
                    "accuracy",
                    path,
                    low.agrees,
                    f"in {dtype} it is off by {sizes[dtype][0]:.1e}, autodiff by "
                    f"{sizes[dtype][1]:.1e}, relative to the truth in float64"
                    + _place(low.where, low.agrees),
                )
                for dtype, low in low_verdicts.items()
            ]
    return leaves, findings


class Sides(NamedTuple):
    """By leaf the cotangents (S, *shape) of the rule and of autodiff.

    Attributes:
        ours: the rule's, in the dtype that is judged.
        truth: autodiff's in float64, from the same numbers.
        low: the rule's in float32.
        automatic: autodiff's in float32.
        low_truth: autodiff's in float64, from float32's numbers.
    """

    ours: Arrays
    truth: Arrays
    low: Arrays
    automatic: Arrays
    low_truth: Arrays


def verdicts_on(
    paths: Sequence[str], sides: Sides, level: DTypeLike, known: Rounding
) -> tuple[Verdict, ...]:
    """The verdict on the gradient of each leaf.

    In float64 against the truth, where float32 shows how much is rounding; in a coarser `level`
    beside autodiff in float32.
    """
    ours = spared(sides.ours, sides.truth)
    if jnp.dtype(level) == jnp.float64:
        runs = zip(sides.low_truth, sides.low, sides.automatic, strict=True)
        coarse = [errors(truth, *both) for truth, *both in runs]
        known = dataclasses.replace(known, coarse=coarse)
        return judge(paths, ours, sides.truth, None, jnp.float64, known)
    return judge(paths, ours, sides.truth, sides.automatic, level, known)


def _rounds(runs: Runs) -> bool:
    """Whether float32 arguments were given, and what is off in float64 is float32's rounding."""
    subject = runs.subject
    truth = runs.at(jnp.float64).automatic
    ours = spared(runs.at(jnp.float64).ours, truth)
    verdicts = judge(subject.paths, ours, truth, None, jnp.float64, runs.rounding)
    if all(verdict.agrees for verdict in verdicts):
        return False
    if any(leaf.dtype == jnp.float64 for leaf in subject.leaves):
        return False
    # Of other random numbers than float64's, autodiff in float32 says nothing of rounding.
    low = None if _other_numbers(runs) else runs.at(jnp.float32).automatic
    known = Rounding(runs.length)
    in_float32 = judge(subject.paths, ours, truth, low, jnp.float32, known)
    off = [leaf for leaf, verdict in zip(ours, verdicts, strict=True) if not verdict.agrees]
    return all(verdict.agrees for verdict in in_float32) and all(_holds(leaf) for leaf in off)


def _holds(leaf: np.ndarray) -> bool:
    """Whether float32 holds every number, which in float64 is no accident."""
    finite = leaf[np.isfinite(leaf)]
    return bool(finite.size and (finite == finite.astype(np.float32)).all())


@runtime_checkable
class Problem(Protocol):
    """What a context is made from."""

    @property
    def subject(self) -> Subject:
        """With a reference, to try mistakes with, where there is one."""

    @property
    def output(self) -> PyTree:
        """Its shapes."""

    @property
    def leaves(self) -> Leaves:
        """Those of floating point."""

    @property
    def cotangents(self) -> Sequence[Sequence[Any]]:
        """Of these, S lists."""


def context(runs: Problem) -> Context:
    """What is known of a problem besides the two gradients, to find causes with."""
    subject = runs.subject
    inputs, rest = subject.named(jnp.float64)
    outputs = jax.tree_util.tree_leaves_with_path(runs.output)
    floating = [
        jax.tree_util.keystr(path, simple=True, separator="/") or "y"
        for path, leaf in outputs
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    columns = zip(*runs.cotangents, strict=True)
    stacked = [np.asarray(np.stack(leaves), np.float64) for leaves in columns]
    pulls: dict[Any, Callable[..., Leaves]] = {}
    lengths = [leaf.shape[0] for leaf in runs.leaves if leaf.shape]
    # What is not differentiated, such as labels, has examples; parameters have none.
    held = [len(x) for path, x in inputs.items() if x.ndim and path not in subject.paths]
    lengths = lengths[:1] or held or [len(x) for x in inputs.values() if x.ndim]

    def vjp_of(reference: Callable[..., PyTree], *first: int) -> Callable[[Named, Named], Named]:
        def automatic(first: Sequence[Any], own: Leaves, rest: Leaves, dy: Leaves) -> Leaves:
            chosen = functools.partial(reference, *first)
            return dataclasses.replace(subject, reference=chosen).automatic(own, rest, dy)[1]

        pull = pulls.setdefault(reference, compiled(automatic))

        def vjp(inputs: Named, errors: Named) -> Named:
            with jax.enable_x64(True):
                own, others = subject.from_named(inputs, rest)
                results = [
                    pull(first, own, others, [jnp.asarray(errors[name][s]) for name in floating])
                    for s in range(len(errors[floating[0]]))
                ]
            return {
                path: np.stack([np.asarray(result[i], np.float64) for result in results])
                for i, path in enumerate(subject.paths)
            }

        return vjp

    @functools.cache
    def mistakes() -> list[tuple[Cause, Named, Callable[[Named, Named], Named]]]:
        if subject.reference is None:
            return []
        first = {name: error[:1] for name, error in incoming.items()}
        try:
            made = Mistakes(subject.reference, subject.array_paths)
            vjp_of(made, NONE)(inputs, first)  # traces it, so that they are known
        except Exception:  # a program that cannot be run equation by equation
            return []
        most = MOST_ELEMENTS // max(1, sum(leaf.size for leaf in subject.leaves))
        vjps = {known: vjp_of(made, number) for number, known in enumerate(made.known[:most])}
        return [
            (Cause(known.kind, known.message), vjp(inputs, first), vjp)
            for known, vjp in vjps.items()
        ]

    def tried(reference: Callable[..., PyTree]) -> Callable[[Named, Named], Named]:
        vjp = vjp_of(reference)

        def where_it_runs(inputs: Named, errors: Named) -> Named:
            try:
                return vjp(inputs, errors)
            except Exception:  # the function does not take that setting here
                return dict.fromkeys(subject.paths, np.asarray(np.nan))

        return where_it_runs

    incoming = dict(zip(floating, stacked, strict=True))
    return Context(
        batch=max(lengths, key=lengths.count, default=None),
        shapes={path: np.shape(x) for path, x in inputs.items()}
        | {name: leaf.shape for name, leaf in zip(floating, runs.leaves, strict=True)},
        inputs=inputs,
        errors=incoming,
        vjp=None if subject.reference is None else vjp_of(subject.reference),
        alternatives={name: tried(other) for name, other in subject.others.items()},
        mistakes=mistakes,
    )


def cause_of(
    path: str, pairs: Mapping[str, tuple[Any, Any]], verdict: Verdict, known: Context
) -> Cause | None:
    """How a leaf is wrong."""
    ours, truth = pairs[path]
    others = {other: pair for other, pair in pairs.items() if other != path}
    noise = dataclasses.replace(known, noise=min(verdict.tolerance, 1e-2))
    return diagnose(ours, truth, others, noise, path)


def _leaf(
    runs: Runs, i: int, ours: Any, truth: Any, verdict: Verdict | None, cause: Cause | None = None
) -> Leaf:
    given = runs.subject.leaves[i]
    return Leaf(
        path=runs.subject.paths[i],
        shape=tuple(given.shape),
        dtype=str(given.dtype),
        ours=ours,
        truth=truth,
        difference=verdict.difference if verdict else 0.0,
        relative=verdict.relative if verdict else 0.0,
        where=verdict.where if verdict else (),
        agrees=verdict.agrees if verdict else True,
        cause=cause,
    )


def _gradient(leaf: Leaf, verdict: Verdict, level: str) -> Finding:
    if verdict.agrees:
        message = (
            f"right in {level}: off by {verdict.relative:.1e} at most, where "
            f"{verdict.tolerance:.1e} is rounding"
        )
        return Finding("gradient", leaf.path, True, message)
    message = "the gradient is wrong"
    if leaf.ours.shape == leaf.truth.shape and leaf.truth.size:
        here: Any = (..., *verdict.where)
        ours, truth = (np.atleast_1d(side[here]) for side in (leaf.ours, leaf.truth))
        with np.errstate(invalid="ignore"):
            worst = int(np.argmax(np.nan_to_num(np.abs(ours - truth), nan=np.inf)))
        place = f" at [{', '.join(map(str, verdict.where))}]" if verdict.where else ""
        got, right = _apart(float(ours[worst]), float(truth[worst]))
        message += f"{place}: {got}, where {right} is right"
    return Finding("gradient", leaf.path, False, message, leaf.cause)


def _apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers in as many digits as it takes to tell them apart."""
    texts = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in (6, 9, 12, 17))
    return next((pair for pair in texts if pair[0] != pair[1]), (repr(a), repr(b)))


def _place(where: tuple[int, ...], agrees: bool) -> str:
    return "" if agrees or not where else f", most at [{', '.join(map(str, where))}]"


def _check_finite(runs: Runs) -> None:
    """Refuses a point at which the reference gives no number at all: NaN agrees with any NaN.

    Raises:
        ValueError: if no element of its outputs is finite.
    """
    y = runs.at(jnp.float32 if runs.refused else jnp.float64).reference_y
    if any(leaf.size for leaf in y) and not any(np.isfinite(leaf).any() for leaf in y):
        raise ValueError(
            f"{runs.subject.name} gives NaN or Inf alone at these arguments, which no gradient can "
            "be judged by; give arguments that it is finite at"
        )


def _values(runs: Runs) -> Iterator[Finding]:
    """Whether the forward gives what the reference does."""
    exact = runs.level == jnp.float64 == runs.resolution
    dtype = jnp.float64 if exact else jnp.float32
    run = runs.at(dtype)
    low, truth = runs.at(jnp.float32), runs.truth(jnp.float32)
    names = [f"y{i}" if len(run.y) > 1 else "" for i in range(len(run.y))]
    ours, reference = ([leaf[None] for leaf in side] for side in (run.y, run.reference_y))
    shapes = {n: (a.shape, b.shape) for n, a, b in zip(names, run.y, run.reference_y, strict=True)}
    if exact:
        noise = [
            errors(t, a, b)[None]
            for a, b, t in zip(low.y, low.reference_y, truth.reference_y, strict=True)
        ]
        verdicts = judge(names, ours, reference, None, jnp.float64, Rounding(runs.length, noise))
    else:
        base = [leaf[None] for leaf in truth.reference_y]
        coarse = max(
            (runs.level, runs.resolution, jnp.dtype(jnp.float32)),
            key=lambda d: float(jnp.finfo(d).eps),
        )
        verdicts = judge(names, ours, base, reference, coarse, Rounding(runs.length))
    for name, verdict in zip(names, verdicts, strict=True):
        message = "the forward gives what the reference does"
        if not verdict.agrees:
            message = f"the forward is not the reference: off by {verdict.relative:.1e}"
            message += _place(verdict.where, False)
        if shapes[name][0] != shapes[name][1]:
            message = "the forward gives shape {}, the reference {}".format(*shapes[name])
        yield Finding("value", name, verdict.agrees, message)


def _low(
    runs: Runs, level: str, findings: list[Finding]
) -> dict[str, tuple[tuple[Verdict, ...], list[tuple[float, float]]]]:
    """By dtype the verdicts, and the errors of ours and of autodiff."""
    found = {}
    others = _other_numbers(runs)
    if others:
        why = (
            "its values in float64 are others than in float32: are random numbers drawn in the "
            "default dtype? Below float64 autodiff in the same dtype is the truth"
        )
        findings.append(Finding("accuracy", "", True, why))
    for dtype in EVERY:
        if dtype in LOW and not runs.subject.narrows:
            why = f"no argument takes on {dtype}: its parameters stay in float32"
            findings.append(Finding("accuracy", "", True, why, skipped=True))
            continue
        try:
            run, exact = runs.at(dtype), runs.truth(dtype)
        except Exception as error:
            why = f"it does not run in {dtype}: {first_sentence(error)}"
            findings.append(Finding("accuracy", "", True, why, skipped=True))
            continue
        truth = exact.automatic
        if others:
            truth = run.automatic
        coarse = max(dtype, level, key=lambda d: float(jnp.finfo(d).eps))
        known = Rounding(runs.length, nearby=None if others else runs.nearby)
        ours = spared(run.ours, truth)
        verdicts = judge(runs.subject.paths, ours, truth, run.automatic, coarse, known)
        errors = (relative_errors(side, truth) for side in (ours, spared(run.automatic, truth)))
        sizes = list(zip(*errors, strict=True))
        found[dtype] = (verdicts, sizes)
    return found


def _other_numbers(runs: Runs) -> bool:
    """Whether the reference is another function in float32 than in float64."""
    low, exact = runs.at(jnp.float32).reference_y, runs.truth(jnp.float32).reference_y
    return (
        max(relative_errors([a[None] for a in low], [b[None] for b in exact]), default=0.0) > 0.05
    )
