"""A subject under several random cotangents, in any dtype: few programs, each compiled once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from backhand.audit.dtypes import coarsest
from backhand.audit.gradient import Rounding, errors
from backhand.audit.inputs import (
    RefusedError,
    check_leaks,
    check_outputs,
    check_same_outputs,
    first_sentence,
    is_array,
    output_shapes,
    readable,
    shapes,
)
from backhand.audit.subject import Leaves, Subject

COTANGENTS = 3
"""Fewer leave an element small by luck; see `backhand.audit.gradient`."""

NEARBY, APART = 8, 2.0**-7
"""How many points are tried next to one, and how far at most a number moves, relative to itself."""

Arrays: TypeAlias = "list[np.ndarray]"

FEW_PASSES = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
"""XLA's options for programs that run a few times: they compile in a fifth of the time (measured on
the rows of CTC and LSTM), and run slower."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function whose values count and whose speed does not."""

    @functools.cache
    def program() -> Any:
        return jax.jit(function, compiler_options=_known_options())

    return lambda *given: program()(*given)


@functools.cache
def _known_options() -> dict[str, Any]:
    """Those of `FEW_PASSES` that this XLA has."""

    def known(options: dict[str, Any]) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except Exception:
            return False
        return True

    if known(FEW_PASSES):
        return FEW_PASSES
    return {name: value for name, value in FEW_PASSES.items() if known({name: value})}


class Run(NamedTuple):
    """What both sides give at one point: leaves in float64, cotangents (S, *shape).

    The reference's are empty where there is none.
    """

    y: Arrays
    ours: Arrays
    reference_y: Arrays
    automatic: Arrays


class Runs:
    """The subject's runs, each made once.

    Args:
        subject: what is audited.
        seed: of the cotangents.

    Raises:
        TypeError: for a subject that does not run, or is not differentiable.
        ValueError: for a reference whose output is of another kind.
    """

    def __init__(self, subject: Subject, seed: int = 0):
        if not subject.paths:
            raise TypeError(
                f"{subject.name} is not differentiable: none of its arguments holds "
                "floating-point arrays; integers, booleans and keys have no gradient, and a Python "
                f"number is a setting: give jnp.asarray(1.5) in place of 1.5; got {_got(subject)}"
            )
        self.subject = subject
        own, rest = subject.shaped(jnp.float32)
        function, name = subject.function, subject.name
        given = _no_arrays(subject)
        self.output = output_shapes(
            name, lambda o, r: function(*subject.rebuild(o, r)), own, rest, given=given
        )
        check_outputs(name, self.output)
        self.leaves = [y for y in jax.tree.leaves(self.output) if _floats(y)]
        rng = np.random.default_rng(seed)
        self.cotangents = [
            [_exact(rng.standard_normal(leaf.shape)) for leaf in self.leaves]
            for _ in range(COTANGENTS)
        ]
        dy = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in self.leaves]
        shapes(f"the gradient of {name}", subject.pull, own, rest, dy)
        check_leaks(name, subject.pull, own, rest, dy)
        if (reference := subject.reference) is not None:
            what = f"the reference of {name}"
            other = output_shapes(what, lambda o, r: reference(*subject.rebuild(o, r)), own, rest)
            check_same_outputs(name, self.output, other)
            try:
                shapes(f"the gradient of {what}", subject.automatic, own, rest, dy)
            except TypeError as error:
                if not subject.note or isinstance(error, RefusedError):
                    raise
                raise TypeError(
                    f"{name} has no reference that JAX can differentiate: {subject.note}, and "
                    f"{first_sentence(error.__context__ or error)}; give reference=plain_function, "
                    "which gives the same in plain JAX"
                ) from None
        try:
            self.refused = self._refused()
        except TypeError:
            if subject.rule is not None or not subject.note:
                raise
            self.subject = dataclasses.replace(subject, reference=None, note="")
            self.refused = self._refused()
        self.rounds: np.dtype | None = None
        self._runs: dict[Any, Run] = {}
        subject = self.subject
        self.ours, self.automatic = compiled(subject.pull), compiled(subject.automatic)
        self._both = compiled(
            lambda own, rest, dy: (*subject.pull(own, rest, dy), *subject.automatic(own, rest, dy))
        )

    def _refused(self) -> str:
        """Why the subject does not run in float64; "" where it does.

        Raises:
            TypeError: for a reference that does not: there is no truth without it.
        """
        name = self.subject.name
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            own, rest = self.subject.shaped(jnp.float64)
            dy = [jax.ShapeDtypeStruct(leaf.shape, jnp.float64) for leaf in self.leaves]
            if self.has_reference:
                what = f"in float64 the reference of {name}"
                shapes(what, self.subject.automatic, own, rest, dy)
            try:
                shapes(name, self.subject.pull, own, rest, dy)
            except TypeError as error:
                return first_sentence(error)
        return ""

    @property
    def has_reference(self) -> bool:
        """Whether there is anything to compare with."""
        return self.subject.reference is not None

    @property
    def has_own_reference(self) -> bool:
        """Whether the reference is another function than the one that is audited."""
        return self.subject.reference not in (None, self.subject.function)

    def errors_like(self, dtype: Any, index: int) -> Leaves:
        """The random cotangent of that number, in a dtype, which holds it exactly."""
        return [jnp.asarray(leaf.astype(dtype)) for leaf in self.cotangents[index]]

    def at(self, dtype: DTypeLike, rounded: DTypeLike | None = None) -> Run:
        """Both sides in a dtype, from numbers rounded to `rounded` before."""
        if rounded is not None and jnp.dtype(rounded) == jnp.dtype(dtype):
            rounded = None
        key = (jnp.dtype(dtype).name, None if rounded is None else jnp.dtype(rounded).name)
        if key not in self._runs:
            with jax.enable_x64(
                jnp.dtype(dtype) == jnp.float64 or jax.config.read("jax_enable_x64")
            ):
                own, rest = self.subject.at(dtype, rounded)
                results = [
                    self.evaluate(own, rest, self.errors_like(dtype, index))
                    for index in range(COTANGENTS)
                ]
            self._runs[key] = _stacked(results)
        return self._runs[key]

    def evaluate(self, own: Leaves, rest: Leaves, dy: Leaves) -> tuple[Leaves, ...]:
        """One run: our output and cotangents, the reference's."""
        if not self.has_reference:
            return (*self.ours(own, rest, dy), [], [])
        if self.refused and own[0].dtype == jnp.float64:
            return ([], [], *self.automatic(own, rest, dy))
        return self._both(own, rest, dy)

    def truth(self, dtype: DTypeLike) -> Run:
        """The run in float64 from the numbers that a run in `dtype` begins with."""
        exact = self.subject.exact()
        same = all(
            np.array_equal(value, value.astype(jnp.float32).astype(np.float64), equal_nan=True)
            for value in exact.values()
        )
        if jnp.dtype(dtype) == jnp.float64 or (jnp.dtype(dtype) == jnp.float32 and same):
            return self.at(jnp.float64)
        return self.at(jnp.float64, rounded=dtype)

    @functools.cached_property
    def _coarsest(self) -> tuple[np.dtype, np.dtype]:
        with jax.enable_x64(True):
            own, rest = self.subject.at(jnp.float64)
            sides = [] if self.refused else [self.subject.value]
            sides += [self.subject.reference_value] if self.has_reference else []
            found = [coarsest(side, own, rest) for side in sides]
        least = jnp.dtype(jnp.float32 if self.refused else jnp.float64)
        computed, held = (
            max(
                (least, *(dtype for dtype in dtypes if dtype is not None)),
                key=lambda dtype: float(jnp.finfo(dtype).eps),
            )
            for dtypes in (zip(*found, strict=True) if found else ((), ()))
        )
        return computed, held

    @property
    def level(self) -> np.dtype:
        """The coarsest dtype that a side's forward, or our rule, computes in, given float64."""
        return self.rounds or self._coarsest[0]

    @property
    def resolution(self) -> np.dtype:
        """The coarsest dtype that a value has in either side's forward, given float64."""
        return self._coarsest[1]

    @functools.cached_property
    def length(self) -> int:
        """The most terms that a sum is expected to have: those of the largest array."""
        sizes = [leaf.size for leaf in (*self.subject.leaves, *self.leaves)]
        return max(sizes, default=1)

    @functools.cached_property
    def rounding(self) -> Rounding:
        """What float32 shows of the magnitudes of the terms, for a verdict in float64."""
        low, truth = self.at(jnp.float32), self.truth(jnp.float32)
        sides = zip(low.ours, low.automatic, truth.automatic, strict=True)
        coarse = [errors(t, a, b) for a, b, t in sides]
        return Rounding(self.length, coarse, self.nearby)

    def nearby(self) -> list[np.ndarray]:
        """By leaf, the largest errors of autodiff in float32 at points next to this one."""
        return self._nearby

    @functools.cached_property
    def _nearby(self) -> list[np.ndarray]:
        return errors_nearby(self.subject, self.cotangents, self.automatic)


def errors_nearby(
    subject: Subject, cotangents: Sequence[Sequence[np.ndarray]], automatic: Callable[..., Any]
) -> list[np.ndarray]:
    """By leaf, the largest errors (*shape) of autodiff in float32 at points next to a subject's.

    At one point what cancels may be exact by luck: x / |x| is often 1 to the last bit. Where a run
    is not finite it shows nothing.
    """
    rng = np.random.default_rng(3)
    found = [np.zeros(leaf.shape) for leaf in subject.leaves]
    for index in range(NEARBY):
        moved: Leaves = []
        sides = []
        for dtype in (np.float32, np.float64):
            with jax.enable_x64(dtype == np.float64 or jax.config.read("jax_enable_x64")):
                own, rest = subject.at(dtype, rounded=np.float32)
                if not moved:
                    moved = [_moved(np.asarray(leaf), rng) for leaf in own]
                dy = [jnp.asarray(leaf.astype(dtype)) for leaf in cotangents[index % COTANGENTS]]
                given = [jnp.asarray(leaf.astype(dtype)) for leaf in moved]
                sides.append([np.asarray(x, np.float64) for x in automatic(given, rest, dy)[1]])
        for i, (low, exact) in enumerate(zip(*sides, strict=True)):
            off = errors(exact[None], low[None])[0]
            found[i] = np.asarray(np.maximum(found[i], np.where(np.isfinite(off), off, 0)))
    return found


def _moved(leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each number another one next to it, of its dtype; zeros stay."""
    moved = leaf * (1 + rng.uniform(-APART, APART, leaf.shape))
    return np.asarray(moved.astype(leaf.dtype))


def _got(subject: Subject) -> str:
    """The arguments, for an error message."""
    pairs = zip(subject.names, subject.arguments, strict=True)
    return ", ".join(f"{name}: {readable(x)}".lstrip(": ") for name, x in pairs) or "none"


def _no_arrays(subject: Subject) -> str:
    """The arguments that hold no array, for an error message: None, or a string by mistake."""
    pairs = zip(subject.names, subject.arguments, strict=True)
    odd = [
        f"{name or 'the first argument'}: {readable(x)}"
        for name, x in pairs
        if x is None or (jax.tree.leaves(x) and not any(map(is_array, jax.tree.leaves(x))))
    ]
    return ", ".join(odd)


def _floats(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _exact(values: np.ndarray) -> np.ndarray:
    """Numbers that every dtype down to bfloat16 holds exactly."""
    return np.asarray(np.asarray(values).astype(jnp.bfloat16), np.float64)


def _stacked(results: list[tuple[Leaves, ...]]) -> Run:
    """The outputs once, the cotangents of all runs on a leading axis."""
    y, ours, reference_y, automatic = (
        [[np.asarray(leaf, np.float64) for leaf in result[part]] for result in results]
        for part in range(4)
    )

    def gathered(runs: list[Arrays]) -> Arrays:
        return [np.stack(leaves) for leaves in zip(*runs, strict=True)]

    return Run(y[0], gathered(ours), reference_y[0], gathered(automatic))
