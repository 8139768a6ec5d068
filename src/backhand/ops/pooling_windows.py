"""Windows that slide over the spatial axes of (B, *spatial, C): what pooling looks through.

Along one axis, with stride s and `before` elements of padding in front, window o covers the padded
positions o s + j of slots j = 0 ... k - 1. To pool is to go over the slots, each a strided slice.

Back again, padded position p = q s + r lies in the windows q - a, at their slots a s + r, for
a = 0 ... ceil(k / s) - 1. So what an element gets is a sum over the shifts a alone, for all its
remainders r at once: no scatter, and one term where the windows do not overlap.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from backhand.arrays import explicit_sharding, in_pairs
from backhand.ops.settings import Padding, PerAxis, pads, per_axis
from backhand.protocol import need_floating

Carry = TypeVar("Carry")

UNROLLED = 64
"""Slots or shifts that are written out; from there on a loop keeps the program small."""

TERMS = 400
"""Slices that are written out in a sum of windows: 5x5 windows with padding have 361."""


@dataclasses.dataclass(frozen=True)
class PoolingWindows:
    """Sizes along each spatial axis.

    Attributes:
        sizes: of the input.
        window, stride: of the windows.
        padding: elements before and after.
    """

    sizes: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        """How many windows there are along each axis."""
        axes = zip(self.sizes, self.window, self.stride, self.padding, strict=True)
        return tuple((size + sum(pads) - k) // s + 1 for size, k, s, pads in axes)

    @property
    def shifts(self) -> tuple[int, ...]:
        """How many windows an element lies in at most."""
        return tuple(-(-k // s) for k, s in zip(self.window, self.stride, strict=True))

    @property
    def is_padded(self) -> bool:
        """Whether any window reaches over the border."""
        return any(pads != (0, 0) for pads in self.padding)

    @property
    def runs(self) -> list[list[tuple[int, int, range]]]:
        """Along each axis: (first, how many, slots) of neighbours with the same slots inside x."""
        found = []
        for size, k, s, o, (before, _) in zip(
            self.sizes, self.window, self.stride, self.outputs, self.padding, strict=True
        ):
            inside = [range(max(0, p), min(k, size + p)) for p in range(before, before - o * s, -s)]
            own, first = [], 0
            for slots, same in itertools.groupby(inside):
                count = len(list(same))
                own.append((first, count, slots))
                first += count
            found.append(own)
        return found

    @property
    def transposed(self) -> "PoolingWindows":
        """For a stride of one: windows over the outputs, of those that each element lies in."""
        around = tuple(
            (k - 1 - before, k - 1 - after)
            for k, (before, after) in zip(self.window, self.padding, strict=True)
        )
        return PoolingWindows(self.outputs, self.window, self.stride, around)

    def axes(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One vector per spatial axis, each along its own axis of (1, *outputs, 1)."""
        rank = len(self.window)
        return [v.reshape(*[1] * (i + 1), -1, *[1] * (rank - i)) for i, v in enumerate(values)]

    def place(self, slots: Sequence[Any]) -> Any:
        """The number of a slot, counted row by row, from its number along each axis."""
        number = slots[0]
        for slot, k in zip(slots[1:], self.window[1:], strict=True):
            number = number * k + slot
        return number


def pooling_windows(
    name: str,
    x: Array | jax.ShapeDtypeStruct,
    window: PerAxis,
    stride: PerAxis | None,
    padding: Padding,
) -> PoolingWindows:
    """The windows that the arguments of a pooling op describe.

    Raises:
        TypeError: if x is not floating point, or a size not an integer.
        ValueError: if they do not fit x (B, *spatial, C), or one another.
    """
    need_floating(name, x)
    given = np.size(window)
    if not 3 <= x.ndim <= 5 or given not in (1, x.ndim - 2):
        lacking = x.ndim < 3 or given == x.ndim - 1
        advice = "; its batch axis may be missing, x[None], or its channel axis, x[..., None]"
        raise ValueError(
            f"{name} needs x of shape (B, *spatial, C) with 1 to 3 spatial axes and a window with "
            f"one size for all or one for each, got x {x.shape} and window {window}"
            f"{advice if lacking else ''}"
        )
    sizes = x.shape[1:-1]
    windows = per_axis(name, "a window", window, len(sizes))
    strides = windows if stride is None else per_axis(name, "a stride", stride, len(sizes))
    around = pads(name, padding, sizes, strides, windows, ("SAME", "VALID"))
    for size, k, (before, after) in zip(sizes, windows, around, strict=True):
        if size < 1 or k > size + before + after:
            raise ValueError(
                f"{name} needs a window within its padded input: got window {windows} over "
                f"x {x.shape} padded by {around}; take a smaller window or padding='SAME'"
            )
        if max(before, after) >= k:
            raise ValueError(
                f"{name} needs padding less than the window {windows}, so that every window holds "
                f"an element of x; got {around}"
            )
    return PoolingWindows(sizes, windows, strides, around)


def padded(x: Array, windows: PoolingWindows, fill: float) -> Array:
    """x with its padding."""
    if not windows.is_padded:
        return x
    around = [(before, after, 0) for before, after in windows.padding]
    return lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), *around, (0, 0, 0)])


def over_slots(
    step: Callable[[Any, Array, Carry], Carry], start: Carry, x: Array, windows: PoolingWindows
) -> Carry:
    """`step(number of the slot, its elements (B, *outputs, C), carry)` for each slot in turn."""
    spans = [(o - 1) * s + 1 for o, s in zip(windows.outputs, windows.stride, strict=True)]

    def at(number: Any, carry: Carry) -> Carry:
        slots = _unravel(number, windows.window)
        span = lax.dynamic_slice(x, (0, *slots, 0), (x.shape[0], *spans, x.shape[-1]))
        return step(number, lax.slice(span, *_whole(span), (1, *windows.stride, 1)), carry)

    return _in_turn(at, start, math.prod(windows.window))


def sums_on_cpu(x: Array, windows: PoolingWindows, elsewhere: Callable[[Array], Array]) -> Array:
    """The sums of windows (B, *outputs, C); not on CPU, and of large windows, those of `elsewhere`.

    On CPU they are sums of slices of x, apart for each run of windows, and nothing is padded:
    16x32x32x64 under 3x3 windows of stride 1 takes 0.5 ms so, by `lax.reduce_window` 10 ms.
    """
    terms = math.prod(sum(len(slots) for _, _, slots in own) for own in windows.runs)
    if terms > TERMS or explicit_sharding(x) is not None:
        return elsewhere(x)
    on_cpu = functools.partial(_sums_of_runs, windows, ())
    return lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)


def _sums_of_runs(
    windows: PoolingWindows, chosen: tuple[tuple[int, int, range], ...], x: Array
) -> Array:
    """The sums of the windows that are in the chosen runs of the first axes."""
    axis = len(chosen)
    if axis < len(windows.sizes):
        parts = [_sums_of_runs(windows, (*chosen, run), x) for run in windows.runs[axis]]
        return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis + 1)
    parts = []
    for slots in itertools.product(*(slots for _, _, slots in chosen)):
        begin, end = [], []
        for (first, count, _), slot, s, (before, _) in zip(
            chosen, slots, windows.stride, windows.padding, strict=True
        ):
            begin.append(first * s + slot - before)
            end.append(begin[-1] + (count - 1) * s + 1)
        strides = (1, *windows.stride, 1)
        parts.append(lax.slice(x, (0, *begin, 0), (len(x), *end, x.shape[-1]), strides))
    return in_pairs(parts)


def spread(
    share: Callable[..., Array],
    given: tuple[Array, ...],
    windows: PoolingWindows,
    lean: bool = False,
) -> Array:
    """What the elements of x (B, *sizes, C) get from all windows that they lie in.

    Args:
        share: `(slots, *given) -> array`: what a window gives to its element at `slots`, their
            numbers along each axis; 0 where `given` is.
        given: arrays (B, *outputs, C).
        windows: the windows.
        lean: whether each shift's term is padded rather than `given`. That keeps no array, but is
            computed element by element: fast where a share is as good as given, slow for a choice.

    For 4 elements, windows of 3 with stride 2 and one element of padding on both sides, and a share
    w_j of g in slot j: two windows, over the padded positions 0 1 2 and 2 3 4, and two shifts. Row
    q of three has the positions 2 q + r:

        a = 0, slots r        g0 w0  g0 w1 | g1 w0  g1 w1 |   0      0
        a = 1, slots 2 + r      0      0   | g0 w2    0   | g1 w2    0      (there is no slot 3)

    Their sum, without the padding in front and what is left behind, is what the elements get:
    g0 w1, g1 w0 + g0 w2, g1 w1, g1 w2.
    """
    shifts, rank = windows.shifts, len(windows.window)
    lean = lean and math.prod(shifts) <= UNROLLED
    counts = windows.outputs
    if not lean and any(n > 1 for n in shifts):
        around = [(0, 0, 0), *[(n - 1, n - 1, 0) for n in shifts], (0, 0, 0)]
        given = tuple(lax.pad(v, jnp.zeros((), v.dtype), around) for v in given)
        counts = tuple(o + n - 1 for o, n in zip(counts, shifts, strict=True))
    between = tuple(range(2, 2 * rank + 1, 2))  # (B, q, r, q, r, C): the axes of remainders
    remainders = [
        lax.broadcasted_iota(jnp.int32, (*[1] * axis, s, *[1] * (2 * rank + 1 - axis)), axis)
        for axis, s in zip(between, windows.stride, strict=True)
    ]

    def at(number: Any, dx: Array | None) -> Array:
        a = _unravel(number, shifts)
        begin = [0 if lean else n - 1 - i for n, i in zip(shifts, a, strict=True)]
        own = [lax.dynamic_slice(v, (0, *begin, 0), (len(v), *counts, v.shape[-1])) for v in given]
        slots = [r + i * s for r, i, s in zip(remainders, a, windows.stride, strict=True)]
        term = share(slots, *[lax.expand_dims(v, between) for v in own])
        for slot, k, s in zip(slots, windows.window, windows.stride, strict=True):
            term = term if k % s == 0 else jnp.where(slot < k, term, 0)
        if lean:
            term = _placed(term, [i * s for i, s in zip(a, windows.stride, strict=True)], windows)
        return term if dx is None else dx + term

    dx = _in_turn(at, None, math.prod(shifts))
    assert dx is not None
    return dx if lean else _placed(dx, [0] * rank, windows)


def _placed(dx: Array, begin: Sequence[int], windows: PoolingWindows) -> Array:
    """(B, q, r, q, r, C), the first of it at the padded position `begin`, as (B, *sizes, C)."""
    counts = dx.shape[1:-1:2]
    lengths = [q * s for q, s in zip(counts, windows.stride, strict=True)]
    pairs = [n for pair in zip(counts, windows.stride, strict=True) for n in pair]
    dx = jnp.broadcast_to(dx, (dx.shape[0], *pairs, dx.shape[-1]))
    sharding = explicit_sharding(dx)
    if sharding is not None:
        spec = (sharding.spec[0], *[None] * len(counts), sharding.spec[-1])
        sharding = sharding.update(spec=spec)
    dx = lax.reshape(dx, (dx.shape[0], *lengths, dx.shape[-1]), out_sharding=sharding)
    axes = zip(begin, windows.padding, windows.sizes, lengths, strict=True)
    inside = [(p - before, before + size - length - p, 0) for p, (before, _), size, length in axes]
    if not any(low or high for low, high, _ in inside):
        return dx
    return lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *inside, (0, 0, 0)])


def _in_turn(step: Callable[[Any, Carry], Carry], carry: Carry, count: int) -> Carry:
    """`step` for 0 ... count - 1: written out where they are few, else in a loop."""
    if count <= UNROLLED:
        for number in range(count):
            carry = step(number, carry)
        return carry
    return lax.fori_loop(1, count, step, step(0, carry))


def _unravel(number: Any, lengths: Sequence[int]) -> tuple[Any, ...]:
    """The place along each axis of an element, counted row by row."""
    found = []
    for length in reversed(lengths):
        found.append(number % length)
        number = number // length
    return tuple(reversed(found))


def _whole(x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a slice of all of x begins and ends."""
    return (0,) * x.ndim, x.shape
