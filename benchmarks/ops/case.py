"""One row of the op benchmark: forward and reverse together, by hand and by autodiff."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.measure import in_turns, memory_ratio, temporary
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
        error, autodiff_error: of output and gradients against float64, the largest in an array
            over its largest element, ours and theirs.
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


# Both ways ----------------------------------------------------------------------------------------


def is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    """`(dy, *arguments) -> (y, cotangents of what is floating point)`."""

    def run(dy: Any, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        where = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

        def of_floating(*given: Any) -> Any:
            known = dict(zip(where, given, strict=True))
            own = [known.get(i, leaf) for i, leaf in enumerate(leaves)]
            return function(*structure.unflatten(own))

        y, pull = jax.vjp(of_floating, *(leaves[i] for i in where))
        return y, pull(dy)

    return run


def error_of(case: Case, arguments: tuple[Any, ...]) -> Any:
    """A random error of the output, the same on both sides."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(case.theirs, *arguments))
    rng = np.random.default_rng(7)
    return structure.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def relative_error(ours: Any, truth: Any) -> float:
    """The largest difference in a leaf over the largest element of it."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        exact = np.asarray(b, np.float64)
        scale = np.abs(exact).max(initial=0) or 1.0
        worst = max(worst, float(np.abs(np.asarray(a, np.float64) - exact).max(initial=0) / scale))
    return worst


def in_float64(function: Callable[..., Any], dy: Any, arguments: tuple[Any, ...]) -> Any:
    """Both ways of a function on the same numbers in float64."""

    def wide(leaf: Any) -> Any:
        return np.asarray(leaf).astype(np.float64) if is_floating(leaf) else leaf

    with jax.enable_x64(True):
        result = jax.jit(both_ways(function))(*jax.tree.map(wide, (dy, *arguments)))
        return jax.tree.map(np.asarray, result)


def measure(case: Case, date: str, samples: int = SAMPLES, seconds: float = SECONDS) -> Row:
    """Times, sizes and errors of one case."""
    arguments = case.make()
    dy = error_of(case, arguments)
    given = (dy, *arguments)
    sides = [jax.jit(both_ways(f)).lower(*given).compile() for f in (case.ours, case.theirs)]
    timing = in_turns(*sides, *given, samples=samples, seconds=seconds)
    ours, theirs = (temporary(side) for side in sides)
    truth = in_float64(case.theirs, dy, arguments)
    autodiff_error = relative_error(sides[1](*given), truth)
    if case.reference is not None:
        truth = in_float64(case.reference, dy, arguments)
    error = relative_error(sides[0](*given), truth)
    del truth
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
        error=error,
        autodiff_error=autodiff_error,
        milliseconds=timing.milliseconds,
        megabytes=(ours / 1e6, theirs / 1e6),
        torch_time_ratio=ratios[by_speed[0]] if ratios else None,
        torch_layout=by_speed[0] if ratios else "",
        torch_others={layout: ratios[layout] for layout in by_speed[1:]},
        date=date,
    )
