"""A row of the catalogue at one size, its right pass run once, to plant many bugs in."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from backhand.arrays import is_floating
from backhand.audit.accuracy import context
from backhand.audit.diagnosis.pair import Context
from backhand.audit.paths import NONE, Mistakes
from backhand.audit.runs import Runs, compiled, errors_nearby
from backhand.audit.selftest.plants import Backward, Bug, Cotangents, Site
from backhand.audit.settings import of_row
from backhand.audit.subject import Leaves, Subject
from backhand.audit.subjects import subject_of
from backhand.catalogue.row import Row
from backhand.visit import PyTree, Residuals

F32, F64 = jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)
DTYPES = (F32, F64)


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """The right pass in one dtype, in NumPy's arrays.

    Attributes:
        arguments: of the pass.
        residuals: that its forward leaves.
        dys: S random errors of the output.
        cotangents: what the right pass gives for each.
        automatic: by leaf, what autodiff gives, (S, *shape) in float64.
    """

    arguments: tuple[PyTree, ...]
    residuals: Residuals
    dys: list[PyTree]
    cotangents: list[Cotangents]
    automatic: list[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a pass gives in one dtype.

    Attributes:
        leaves: the cotangents, (S, *shape) in float64.
        faults: paths where one is missing, too much, or of another shape or dtype.
    """

    leaves: list[np.ndarray]
    faults: frozenset[str]


Results: TypeAlias = Mapping[np.dtype, Result]


class Trial:
    """One row at one size.

    Args:
        row: of the catalogue.
        seed: of arguments and errors.
        sizes: lengths of axes, as `Row.arguments` takes them.
    """

    def __init__(self, row: Row, seed: int = 0, **sizes: int):
        self.row, self.seed, self.sizes = row, seed, sizes
        self.subject = subject_of(row, row.arguments(jnp.float32, seed, **sizes))
        self.runs = Runs(self.subject, seed)
        self.paths = self.subject.paths
        self.forward, self.backward = compiled(row.forward), compiled(row.backward)
        self._points: dict[tuple[np.dtype, int], Point] = {}
        self._near: dict[int, list[np.ndarray]] = {}

    def __repr__(self) -> str:
        """The row and its size."""
        return f"{self.row!r} at {self.sizes}"

    def at(self, dtype: Any, seed: int | None = None) -> Point:
        """The right pass in a dtype, at the trial's arguments or at those of another seed."""
        key = (jnp.dtype(dtype), self.seed if seed is None else seed)
        if key not in self._points:
            self._points[key] = self._point(*key)
        return self._points[key]

    def _point(self, dtype: np.dtype, seed: int) -> Point:
        subject, cotangents = self._given(seed)
        with jax.enable_x64(dtype == F64):
            own, rest = subject.at(dtype)
            arguments = subject.rebuild(own, rest)
            y, residuals = self.forward(*arguments)
            residuals = _host(residuals)
            dys = [error_of(y, each) for each in cotangents]
            right = [_host(self.backward(arguments, residuals, dy)) for dy in dys]
            pulled = [
                self.runs.automatic(own, rest, [jnp.asarray(leaf, dtype) for leaf in each])[1]
                for each in cotangents
            ]
        return Point(arguments, residuals, dys, right, _stacked(pulled))

    def _given(self, seed: int) -> tuple[Subject, list[list[np.ndarray]]]:
        """The subject and the errors of its output, at a seed."""
        if seed == self.seed:
            return self.subject, self.runs.cotangents
        subject = subject_of(self.row, self.row.arguments(jnp.float32, seed, **self.sizes))
        return subject, [[np.flip(leaf) for leaf in each] for each in self.runs.cotangents]

    def nearby(self, seed: int) -> list[np.ndarray]:
        """By leaf, the largest errors of autodiff in float32 at points next to those of a seed."""
        if seed not in self._near:
            self._near[seed] = errors_nearby(*self._given(seed), self.runs.automatic)
        return self._near[seed]

    @functools.cached_property
    def context(self) -> Context:
        """What a diagnosis may use."""
        return context(self.runs)

    @functools.cached_property
    def sites(self) -> list[Site]:
        """Where bugs are planted: one in each leaf."""
        held = self.subject.held
        leaves = [
            ((index, place), leaf.shape)
            for index, argument in enumerate(self.subject.arguments)
            for place, leaf in enumerate(jax.tree.leaves(argument))
            if index not in held and is_floating(leaf)
        ]
        return [
            Site(
                place,
                twin=next((at for at, s in leaves if at != place and s == shape), None),
                batch=self.context.batch,
                seed=seed,
            )
            for seed, (place, shape) in enumerate(leaves)
        ]

    def rights(self, seed: int) -> Results:
        """What the right pass gives at the arguments of a seed, by dtype."""
        return {
            dtype: self.result(dtype, self.at(dtype, seed).cotangents, seed) for dtype in DTYPES
        }

    @functools.cached_property
    def right(self) -> Results:
        """What the right pass gives, by dtype."""
        return self.rights(self.seed)

    def wrong(self, bug: Bug, site: Site) -> Results | None:
        """What the pass gives with a bug, by dtype; None where the bug has nothing to change."""
        found = {}
        for dtype in DTYPES:
            point = self.at(dtype)
            with jax.enable_x64(dtype == F64), np.errstate(all="ignore"):
                planted = self.planted(dtype, bug, site, self._known(dtype))
                if planted is None:
                    return None
                given = [planted(point.arguments, point.residuals, dy) for dy in point.dys]
            found[dtype] = self.result(dtype, given)
        return found

    def planted(
        self, dtype: Any, bug: Bug, site: Site, right: Backward | None = None
    ) -> Backward | None:
        """The pass in a dtype with a bug in it; None where there is nothing to change."""
        defaults = next(iter(self._defaults.values()), None)
        equipped = dataclasses.replace(
            site,
            other=self.at(dtype, self.seed + 1).residuals,
            dys=self.at(dtype).dys,
            defaults=defaults and (lambda *given: _host(defaults(*given))),
            mistaken=self._mistaken,
        )
        return bug.plant(right or self.backward, equipped)

    @functools.cached_property
    def _mistakes(self) -> tuple[Mistakes, Any]:
        """The reference with mistakes, and its reverse `(number, own, rest, dy) -> cotangents`."""
        assert self.subject.reference is not None
        made = Mistakes(self.subject.reference, self.subject.array_paths)

        def reverse(number: Any, own: Leaves, rest: Leaves, dy: Leaves) -> Leaves:
            chosen = functools.partial(made, number)
            return dataclasses.replace(self.subject, reference=chosen).automatic(own, rest, dy)[1]

        return made, compiled(reverse)

    def _mistaken(self, kind: str) -> Backward | None:
        """The pass with the last mistake of a kind; None for a row with settings of its own."""
        if self.row.settings:
            return None
        made, reverse = self._mistakes
        subject = self.subject

        def wrong(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
            leaves = jax.tree.leaves(arguments)
            own = [leaves[place] for place in subject._places]
            rest = [leaves[p] for p in subject._arrays if p not in subject._places]
            errors = [e for e in map(jnp.asarray, jax.tree.leaves(dy)) if is_floating(e)]
            given = (own, rest, errors)
            if not made.known:
                reverse(NONE, *given)
            numbers = [n for n, mistake in enumerate(made.known) if mistake.kind == kind]
            found = reverse(numbers[-1] if numbers else NONE, *given)
            return subject.rebuild(_host(found), [None] * len(rest))

        return wrong

    def _known(self, dtype: np.dtype) -> Backward:
        """The right pass; what it gives at the point itself is known."""
        point = self.at(dtype)

        def right(arguments: tuple[PyTree, ...], residuals: Residuals, dy: PyTree) -> Cotangents:
            for known, cotangents in zip(point.dys, point.cotangents, strict=True):
                if dy is known and residuals is point.residuals:
                    return cotangents
            return _host(self.backward(arguments, residuals, dy))

        return right

    @functools.cached_property
    def _defaults(self) -> dict[str, Any]:
        return {name: compiled(row.backward) for name, row in self._alternatives.items()}

    @functools.cached_property
    def _alternatives(self) -> dict[str, Row]:
        """The row without one of its settings, by what that then is, where it is a row alike."""
        found = {}
        for name, other in of_row(self.row):
            try:
                alike = _shapes(other, self.sizes) == _shapes(self.row, self.sizes)
            except (TypeError, ValueError):
                continue
            if alike:
                found[name] = other
        return found

    def result(self, dtype: Any, cotangents: list[Cotangents], seed: int | None = None) -> Result:
        """Cotangents by leaf, aligned as `bh.check` does it."""
        point, faults, columns = self.at(dtype, seed), set[str](), []
        for given in cotangents:
            with jax.enable_x64(dtype == F64):
                found, odd = self.subject._aligned(point.arguments, given)
            faults |= {path for path, _ in odd}
            places = zip(found, self.subject._arrays, strict=True)
            own = [leaf for leaf, place in places if place in self.subject._places]
            columns.append(
                [
                    np.zeros(truth.shape[1:]) if leaf is None else np.asarray(leaf, np.float64)
                    for leaf, truth in zip(own, point.automatic, strict=True)
                ]
            )
        return Result(_stacked(columns), frozenset(faults))


def _shapes(row: Row, sizes: Mapping[str, int]) -> Any:
    """Of a row's arguments, outputs and residuals."""

    def run() -> Any:
        arguments = row.arguments(jnp.float32, **sizes)
        return arguments, row.forward(*arguments)

    return jax.eval_shape(run)


def _host(tree: PyTree) -> PyTree:
    """The arrays of a tree in NumPy; keys stay as they are."""

    def leaf(x: Any) -> Any:
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)

    return jax.tree.map(leaf, tree)


def error_of(y: PyTree, values: Sequence[np.ndarray]) -> PyTree:
    """Errors for the floating-point leaves of an output, in their dtypes."""
    left = iter(values)
    return jax.tree.map(
        lambda leaf: (
            next(left).astype(leaf.dtype)
            if is_floating(leaf)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        y,
    )


def _stacked(columns: Sequence[Sequence[Any]]) -> list[np.ndarray]:
    """By leaf (S, *shape) in float64, from S lists of leaves."""
    return [
        np.stack([np.asarray(leaf, np.float64) for leaf in leaves])
        for leaves in zip(*columns, strict=True)
    ]
