"""Is a gradient the derivative of its own function? Small steps along it tell, without a reference.

Along a direction d the slope that a gradient promises, <g, d>, is held against the function's
values at steps of both signs. What is left over,

    R(h) = f(x + h d) - f(x) - h <g, d>,

falls four times for each halving of the step where the gradient is right, twice where it is wrong.
At a kink the values of both signs tell: their mean moves away from f(x) like |h|, not like h^2.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from backhand.audit.inputs import first_sentence
from backhand.audit.result import Finding
from backhand.audit.runs import COTANGENTS, Run, Runs, compiled
from backhand.audit.subject import Leaves

SCALES = tuple(2.0**-power for power in (4, 8, 12, 16))
HALVINGS = (1.0, 0.5, 0.25)
MOST_LEAVES = 12
"""With more, one direction moves several together, until one of them is wrong."""

REFERENCE = "the reference's "

EXACT = 1e-7
"""The relative error of a slope that even a rule with many roundings stays within."""


@dataclasses.dataclass(frozen=True)
class Slope:
    """What the steps along one direction show of one gradient.

    Attributes:
        kind: "second order", "exactly linear", "linear between kinks", "at round-off", "kink
            suspected" or "WRONG".
        promised: the slope by the gradient, for the cotangent that it is worst for.
        measured: the slope by the function's values.
        ratio: how many times the remainder falls for each halving, where it can be seen.
    """

    kind: str
    promised: float
    measured: float
    ratio: float | None = None


def taylor(runs: Runs) -> list[Finding]:
    """The Taylor test of the hand-written gradient and of the reference's, leaf by leaf."""
    # A rule that computes in float32 promises a slope that is rounded to it.
    coarsest = max(runs.resolution, runs.level, key=lambda dtype: float(jnp.finfo(dtype).eps))
    eps = float(jnp.finfo(coarsest).eps)
    if eps > float(jnp.finfo(jnp.float32).eps):
        why = f"it computes in {coarsest}, too coarse for small steps"
        return [Finding("taylor", "", True, why, skipped=True)]
    if runs.refused:
        why = f"small steps need float64: {runs.refused}"
        return [Finding("taylor", "", True, why, skipped=True)]
    run, paths = runs.at(jnp.float64), runs.subject.paths
    points = [*runs.subject.exact().values(), *run.y]
    if not all(np.isfinite(leaf).all() for leaf in points):
        why = "a NaN or Inf comes in or out: there is no slope"
        return [Finding("taylor", "", True, why, skipped=True)]
    steps = Steps(runs, _directions(runs))
    findings = list[Finding]()
    groups = _groups(list(range(len(paths))), MOST_LEAVES)
    while groups:
        try:
            sides = steps.along(groups)
        except Exception as error:
            why = f"the function does not run along a step: {first_sentence(error)}"
            return [Finding("taylor", "", True, why, skipped=True)]
        wrong = list[list[int]]()
        for place, own in enumerate(groups):
            found = [
                _judged(runs, run, whose, own, steps.directions, values[place], sizes, eps)
                for whose, (values, sizes) in zip(("", REFERENCE), sides, strict=False)
            ]
            if len(own) > 1 and not all(finding.passed for finding in found):
                wrong.append(own)
            else:
                findings += found
        groups = [half for own in wrong for half in _groups(own, 2)]
    return findings


def _groups(leaves: list[int], most: int) -> list[list[int]]:
    """The leaves in at most so many groups of neighbours, as long as each other."""
    bounds = np.linspace(0, len(leaves), min(most, len(leaves)) + 1).astype(int)
    return [leaves[a:b] for a, b in itertools.pairwise(bounds)]


def _judged(
    runs: Runs,
    run: Run,
    whose: str,
    own: list[int],
    directions: list[np.ndarray],
    values: np.ndarray,
    sizes: np.ndarray,
    eps: float,
) -> Finding:
    """What is found of one side's gradient along the direction of some leaves."""
    leaves = run.automatic if whose else run.ours
    path = runs.subject.paths[own[0]] if len(own) == 1 else ""
    if any(_infinite(runs, run, i, whose) for i in own):
        why = f"{whose}gradient is not finite here: there is no slope"
        return Finding("taylor", path, True, why, skipped=True)
    promised = np.sum([_slopes(leaves[i], directions[i]) for i in own], axis=0)
    stopped = runs.has_own_reference and not any(
        np.any(side[i]) for i in own for side in (run.ours, run.automatic)
    )
    return _finding(whose, path, classify(promised, values, sizes, eps), stopped)


def _infinite(runs: Runs, run: Run, i: int, whose: str) -> bool:
    """Whether a leaf's gradients are not finite at the same elements, or the reference's alone."""
    if not runs.has_reference or run.ours[i].shape != run.automatic[i].shape:
        return False
    ours, automatic = (~np.isfinite(side[i]) for side in (run.ours, run.automatic))
    if whose and automatic.any():
        return True
    return bool(ours.any() and (ours == automatic).all())


def _slopes(gradients: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """<g, d> for each cotangent; NaN for a gradient of another shape."""
    if gradients.shape[1:] != direction.shape:
        return np.full(len(gradients), np.nan)
    return np.sum(gradients * direction, axis=tuple(range(1, gradients.ndim)))


def classify(promised: np.ndarray, values: np.ndarray, sizes: np.ndarray, eps: float) -> Slope:
    """What the values along one direction say of the slopes (S,) that a gradient promises.

    Args:
        promised: the slopes <g, d>.
        values: f(x + h d) - f(x), (scales, halvings, signs, S).
        sizes: the sum of the magnitudes of what f adds up, (S,): its rounding.
        eps: of the dtype that f computes in.
    """
    steps = np.asarray(SCALES)[:, None] * np.asarray(HALVINGS)
    odd = (values[:, :, 0] - values[:, :, 1]) / 2
    even = (values[:, :, 0] + values[:, :, 1]) / 2
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        slopes = odd / steps[:, :, None]
        better = (4 * slopes[:, 1:] - slopes[:, :-1]) / 3
        measured = better[:, 1]
        noise = 64 * eps * sizes / steps[:, 2, None]
        unsure = 4 * np.abs(better[:, 1] - better[:, 0]) + noise
        size = np.sqrt(np.mean(measured**2, axis=1, keepdims=True))
        limit = unsure + max(EXACT, 1024 * eps) * np.maximum(np.abs(measured), size)
        limit = np.where(np.isfinite(limit), limit, np.inf)
        off = np.abs(measured - promised)
        kinked = (np.abs(even[:, 2]) > np.abs(even[:, 0]) / 8) & (
            np.abs(even[:, 2]) > noise * steps[:, 2, None]
        )
    if not np.isfinite(promised).all():
        return Slope("WRONG", float("nan"), float("nan"))
    best = np.argmin(limit, axis=0)
    each = np.arange(len(promised))
    chosen_off, chosen_limit = off[best, each], limit[best, each]
    if not np.isfinite(chosen_limit).all():
        return Slope("at round-off", float(promised[0]), float("nan"))
    wrong = chosen_off > chosen_limit
    worst = int(np.argmax(np.where(wrong, chosen_off / np.maximum(chosen_limit, 1e-300), -1)))
    shown = float(promised[worst]), float(measured[best[worst], worst])
    if (wrong & ~kinked[best, each]).any():
        return Slope("WRONG", *shown)
    if kinked[best, each].any():
        return Slope("kink suspected", *shown)
    remainder = np.abs(values[:, :, 0] - steps[:, :, None] * promised)
    floor = 64 * eps * sizes
    visible = remainder > 8 * floor
    if not visible.any():
        moves = np.abs(values[:, :, 0]) > 1e6 * floor
        return Slope("exactly linear" if moves.any() else "at round-off", *shown)
    pairs = visible[:, 0] & visible[:, 2]
    ratios = np.sqrt(remainder[:, 0][pairs] / remainder[:, 2][pairs])
    if not visible[best, :, each].any() and not (ratios >= 3).any():
        return Slope("linear between kinks", *shown)
    return Slope("second order", *shown, float(np.median(ratios)) if pairs.any() else None)


def _directions(runs: Runs) -> list[np.ndarray]:
    """A random direction for each leaf, as long as the leaf itself."""
    rng = np.random.default_rng(1)
    found = []
    for leaf in runs.subject.leaves:
        values = np.asarray(leaf, np.float64)
        size = float(np.sqrt(np.mean(np.square(values)))) if values.size else 1.0
        scale = size if 0 < size < np.inf else 1.0
        found.append(np.asarray(rng.standard_normal(values.shape) * scale))
    return found


class Steps:
    """Both sides' values at steps along the directions of some leaves, in one program.

    Args:
        runs: the subject's.
        directions: one a leaf.
    """

    def __init__(self, runs: Runs, directions: list[np.ndarray]):
        self.directions, self._runs = directions, runs
        subject = runs.subject
        sides = [subject.value] + ([subject.reference_value] if runs.has_own_reference else [])

        @compiled
        def run(
            own: Leaves, rest: Leaves, dy: Leaves, directions: Leaves, steps: Array, moves: Array
        ) -> Any:
            def along(side: Any) -> tuple[Array, Array]:
                def value(step: Array) -> tuple[Array, Array]:
                    moved = [
                        leaf + by * direction
                        for leaf, direction, by in zip(own, directions, step, strict=True)
                    ]
                    y = [leaf.astype(float) for leaf in side(moved, rest)]
                    sizes = _inner([jnp.abs(e) for e in dy], [jnp.abs(leaf) for leaf in y])
                    return _inner(dy, y), sizes

                every = (steps[None, :, None] * moves[:, None, :]).reshape(-1, len(own))
                # The point itself is one more step, in the same program.
                values, sizes = lax.map(value, jnp.concatenate([0 * every[:1], every]))
                return values[1:] - values[:1], sizes[0]

            return [along(side) for side in sides]

        self._run = run

    def along(self, groups: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each side, values (L, scales, halvings, signs, S) along L groups, and sizes (S,)."""
        grid = np.indices((len(SCALES), len(HALVINGS), 2))
        scale, halving, sign = (axis.ravel() for axis in grid)
        steps = np.asarray(SCALES)[scale] * np.asarray(HALVINGS)[halving] * (1.0 - 2 * sign)
        most = min(MOST_LEAVES, len(self.directions))
        found = [
            self._some(groups[at : at + most], most, steps) for at in range(0, len(groups), most)
        ]
        return [
            (np.concatenate([values for values, _ in side]), side[0][1])
            for side in zip(*found, strict=True)
        ]

    def _some(
        self, groups: list[list[int]], most: int, steps: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same along as many groups as the program takes at once."""
        moves = np.zeros((most, len(self.directions)))
        for place, own in enumerate(groups):
            moves[place, own] = 1
        with jax.enable_x64(True):
            own, rest = self._runs.subject.at(jnp.float64)
            columns = zip(*self._runs.cotangents, strict=True)
            dy = [jnp.asarray(np.stack(leaves)) for leaves in columns]
            given = [jnp.asarray(direction) for direction in self.directions]
            results = self._run(own, rest, dy, given, jnp.asarray(steps), jnp.asarray(moves))
        shape = (most, len(SCALES), len(HALVINGS), 2, COTANGENTS)
        return [
            (np.asarray(values).reshape(shape)[: len(groups)], np.asarray(size))
            for values, size in results
        ]


def _inner(errors: Leaves, y: Leaves) -> Array:
    """The inner products (S,) of errors (S, *shape) with an output."""
    products = [
        jnp.sum(error * leaf[None], axis=tuple(range(1, error.ndim)))
        for error, leaf in zip(errors, y, strict=True)
    ]
    return jnp.sum(jnp.stack(products), axis=0)


def _finding(whose: str, path: str, slope: Slope, stopped: bool) -> Finding:
    if slope.kind == "WRONG" and stopped:
        return Finding(
            "taylor", path, True, f"{whose}gradient is stopped on purpose, on both sides"
        )
    if slope.kind != "WRONG":
        falls = f", the remainder falls {slope.ratio:.2f} times a halving" if slope.ratio else ""
        return Finding("taylor", path, True, f"{whose}gradient: {slope.kind}{falls}")
    message = (
        f"{whose}gradient is not the derivative of {'its' if whose else 'the'} function: it "
        f"promises a slope of {slope.promised:.6g}, the values show {slope.measured:.6g}"
    )
    if whose:
        message += "; is there a stop_gradient or a custom rule in the reference?"
    return Finding("taylor", path, False, message)
