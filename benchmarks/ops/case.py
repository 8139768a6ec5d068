"""One row of the op benchmark: forward and reverse together, by hand and by autodiff."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.measure import in_turns, memory_ratio, temporary
from benchmarks.ops.errors import both_ways, draw, errors
from benchmarks.ops.peer import Prepare, peers

SAMPLES, SECONDS = 11, 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An op at one setting.

    Attributes:
        op: its name.
        setting: its shapes, and the other side's form where there are several, for the table.
        make: makes the arguments, pytrees of arrays; what is floating point in them is
            differentiated.
        ours: `(*arguments) -> y`, which JAX differentiates by the hand-written rule.
        theirs: the same function, as an expert would write it for `jax.grad`.
        torch: PyTorch's forms by the name of their layout.
        dtype: of the arguments.
        reference: what `ours` is compared with in float64, where that is not `theirs`.
    """

    op: str
    setting: str
    make: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    torch: Mapping[str, Prepare] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    reference: Callable[..., Any] | None = None

    @property
    def name(self) -> tuple[str, str, str]:
        return self.op, self.setting, self.dtype


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one case: ratios are ours / theirs, below 1 is faster or leaner.

    Attributes:
        op, setting, dtype: of the case.
        time_ratio: the median of pairs of times.
        time_low, time_high: its quartiles.
        memory_ratio: of temporary memory; None where theirs needs none and ours some.
        error, autodiff_error: of output and gradients against float64, ours and theirs: the
            largest of an array over its largest element, of the worst array.
        rms_error, autodiff_rms_error: the root mean square of the errors of an array over that of
            its elements, of the worst array.
        milliseconds, megabytes: ours and theirs.
        torch_time_ratio: our time over PyTorch's, where it has the op and is installed.
        torch_layout: which of its layouts that is, the fastest.
        torch_others: our time over that of its other layouts, by their names.
        date: when it was measured.
    """

    op: str
    setting: str
    dtype: str
    time_ratio: float
    time_low: float
    time_high: float
    memory_ratio: float | None
    error: float
    autodiff_error: float
    rms_error: float
    autodiff_rms_error: float
    milliseconds: tuple[float, float]
    megabytes: tuple[float, float]
    torch_time_ratio: float | None = None
    torch_layout: str = ""
    torch_others: Mapping[str, float] = dataclasses.field(default_factory=dict)
    date: str = ""

    @property
    def name(self) -> tuple[str, str, str]:
        return self.op, self.setting, self.dtype


# Arguments ----------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: str = "float32") -> Array:
    """Normal numbers, the same each time for a seed."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Array:
    """Integers from `low` up to and without `high`, int32."""
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), jnp.int32)


def sized(*sizes: int) -> str:
    """A shape in a setting."""
    return "x".join(map(str, sizes))


def summed(losses_of: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
    """A function that gives one loss a number, as their sum and their count."""

    def run(*arrays: Array) -> tuple[Array, Array]:
        losses = losses_of(*arrays)
        return jnp.sum(losses), jnp.asarray(losses.size, losses.dtype)

    return run


# Measuring ----------------------------------------------------------------------------------------


def measure(case: Case, date: str, samples: int = SAMPLES, seconds: float = SECONDS) -> Row:
    """Times, sizes and errors of one case."""
    arguments = case.make()
    given = draw(case.theirs, arguments, 0)
    sides = compiled(case, given)
    timing = in_turns(*sides, *given, samples=samples, seconds=seconds)
    ours, theirs = (temporary(side) for side in sides)
    ran = functools.partial(in_turns, lambda: jax.block_until_ready(sides[0](*given)))
    ratios = {
        peer.layout: ran(peer.run, samples=samples, seconds=seconds).ratio
        for peer in peers(case.torch, *given)
    }
    by_speed = sorted(ratios, key=lambda layout: -ratios[layout])
    return Row(
        *case.name,
        time_ratio=timing.ratio,
        time_low=timing.low,
        time_high=timing.high,
        memory_ratio=memory_ratio(ours, theirs),
        **errors_of(case, arguments, sides),
        milliseconds=timing.milliseconds,
        megabytes=(ours / 1e6, theirs / 1e6),
        torch_time_ratio=ratios[by_speed[0]] if ratios else None,
        torch_layout=by_speed[0] if ratios else "",
        torch_others={layout: ratios[layout] for layout in by_speed[1:]},
        date=date,
    )


def compiled(case: Case, given: tuple[Any, ...]) -> list[jax.stages.Compiled]:
    """Both ways of ours and of theirs."""
    return [jax.jit(both_ways(f)).lower(*given).compile() for f in (case.ours, case.theirs)]


def errors_of(
    case: Case, arguments: tuple[Any, ...], sides: Sequence[Callable[..., Any]]
) -> dict[str, float]:
    """The errors of a row."""
    if case.reference is None:
        ours, theirs = errors(sides, case.theirs, arguments)
    else:
        (ours,) = errors(sides[:1], case.reference, arguments)
        (theirs,) = errors(sides[1:], case.theirs, arguments)
    largest = {"error": ours[0], "autodiff_error": theirs[0]}
    return {**largest, "rms_error": ours[1], "autodiff_rms_error": theirs[1]}


def with_errors(row: Row, case: Case) -> Row:
    """A row with its errors measured again."""
    arguments = case.make()
    sides = compiled(case, draw(case.theirs, arguments, 0))
    return dataclasses.replace(row, **errors_of(case, arguments, sides))
