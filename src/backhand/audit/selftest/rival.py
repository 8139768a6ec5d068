"""The same passes as `jax.test_util.check_grads` sees them, to set beside the audit."""

import collections
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.outcome import outcome
from backhand.audit.selftest.plants import Backward, Bug, Site, leaves_of
from backhand.audit.selftest.trial import DTYPES, F32, F64, Results, Trial, error_of
from backhand.audit.subject import Leaves, floating_leaves
from backhand.visit import PyTree

Setting: TypeAlias = "tuple[str, float | None]"

SAMPLED = 6
"""Of how many bugs one is tried in a row."""

STEPS: dict[np.dtype, tuple[float | None, ...]] = {F32: (None, 1e-3, 1e-2, 1e-1), F64: (None,)}
"""The steps that are tried, None for its own."""


class Rival:
    """What `check_grads` says of right passes, and of a sample of bugs.

    Attributes:
        left_out: how many rows it is spared: where it fails the right pass in float64 too, because
            the gradient is not the derivative by design (frozen, running statistics, a cast).
        correct: how many right passes it was given in each dtype.
        alarms: by dtype and step, how many of them it fails.
        bugs: by dtype, kind and step, `(planted, caught)`.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self.correct: collections.Counter[str] = collections.Counter()
        self.alarms: collections.Counter[Setting] = collections.Counter()
        self.bugs: dict[tuple[str, str, float | None], tuple[int, int]] = {}

    def merge(self, other: "Rival") -> None:
        """Counts what another has counted."""
        self.left_out += other.left_out
        self.correct.update(other.correct)
        self.alarms.update(other.alarms)
        for place, (planted, caught) in other.bugs.items():
            before = self.bugs.get(place, (0, 0))
            self.bugs[place] = before[0] + planted, before[1] + caught

    def add(self, trial: Trial, turn: int = 0) -> None:
        """A row at one size: the right pass at every step, and some bugs, others every turn."""
        if not passes(trial, F64):
            self.left_out += 1
            return
        for dtype in DTYPES:
            self.correct[dtype.name] += 1
            for step in STEPS[dtype]:
                self.alarms[dtype.name, step] += not passes(trial, dtype, step=step)
        self._bugs(trial, turn)

    def _bugs(self, trial: Trial, turn: int) -> None:
        """One of every few bugs, in the first leaf where there is a bug to see."""
        for number, bug in enumerate(BUGS.values()):
            if (turn + number) % SAMPLED:
                continue
            for site in trial.sites[:1] if bug.whole else trial.sites:
                wrong = trial.wrong(bug, site)
                seen = [] if wrong is None else _seen(trial, wrong)
                for dtype in seen:
                    for step in STEPS[dtype]:
                        planted, caught = self.bugs.get((dtype.name, bug.kind, step), (0, 0))
                        found = not passes(trial, dtype, bug, site, step)
                        self.bugs[dtype.name, bug.kind, step] = planted + 1, caught + found
                if seen:
                    break

    def best(self, dtype: str) -> float | None:
        """The step at which the fewest right passes fail, the smallest of several."""
        steps = STEPS[jnp.dtype(dtype)]
        return min(steps, key=lambda step: (self.alarms[dtype, step], steps.index(step)))


def _seen(trial: Trial, wrong: Results) -> list[np.dtype]:
    """The dtypes in which there is a bug to see."""
    return [dtype for dtype in DTYPES if outcome(trial, dtype, wrong).changed]


def passes(
    trial: Trial,
    dtype: Any,
    bug: Bug | None = None,
    site: Site | None = None,
    step: float | None = None,
) -> bool:
    """Whether `check_grads` lets the reverse pass pass, with a bug or as it is.

    Args:
        trial: the row, at its size and seed.
        dtype: of the arguments.
        bug: to plant; None for the right pass.
        site: where.
        step: of its finite differences; None for its own.
    """
    with jax.enable_x64(jnp.dtype(dtype) == F64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, rest = trial.subject.at(dtype)
        function = _function(trial, dtype, rest, bug, site)
        np.random.seed(0)  # its random direction is drawn from NumPy's own generator
        try:
            check_grads(function, (own,), order=1, modes=["rev"], eps=step)
        except (AssertionError, TypeError, ValueError):
            return False
    return True


def _function(
    trial: Trial, dtype: Any, rest: Leaves, bug: Bug | None, site: Site | None
) -> Callable[[Leaves], Leaves]:
    """The row as a `jax.custom_vjp` function of its floating-point leaves."""
    subject = trial.subject
    backward: Backward = trial.backward
    if bug is not None and site is not None:
        backward = trial.planted(dtype, bug, site) or backward

    def forward(own: Leaves) -> tuple[Leaves, PyTree]:
        y, residuals = trial.forward(*subject.rebuild(own, rest))
        return floating_leaves(y), (own, y, residuals)

    def reverse(saved: PyTree, dy: Leaves) -> tuple[Leaves]:
        own, y, residuals = saved
        arguments = subject.rebuild(own, rest)
        given = leaves_of(arguments, backward(arguments, residuals, error_of(y, dy)))
        found = [given[argument][leaf] for argument, leaf in (s.place for s in trial.sites)]
        zeros = zip(found, own, strict=True)
        return ([jnp.zeros_like(x) if leaf is None else jnp.asarray(leaf) for leaf, x in zeros],)

    function = jax.custom_vjp(lambda own: forward(own)[0])
    function.defvjp(forward, reverse)
    return function
