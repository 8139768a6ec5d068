"""Causes that show in a whole leaf: a relation between the wrong gradient and the right one.

Each detector takes a `Pair` and gives a `Cause`, or None where its relation does not hold.
"""

import itertools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from backhand.audit.diagnosis.pair import Pair, cosine, fit
from backhand.audit.result import Cause

LOWER = {name: jnp.dtype(name) for name in ("float32", "float16", "bfloat16")}
"""The dtypes that a cotangent may have been rounded to, by name."""

_POWERS = (
    (1.0, "a mean over {} is missing", "a mean is taken over {} that should be a sum"),
    (0.5, "a division by the root of {} is missing", "divided by the root of {}"),
)

FARTHEST = 32
"""How many places along an axis a leaf is tried to be rolled."""

FEW = 16
"""Of how many elements of each place the roll is tried first: most are off by far in any."""


def shape(pair: Pair) -> Cause | None:
    """Another shape or dtype."""
    if pair.ours.shape != pair.truth.shape:
        got, needs = pair.ours.shape[1:], pair.truth.shape[1:]
        return Cause("shape", f"its shape is {got}, and must be that of its primal, {needs}")
    dtypes = pair.context.dtypes
    if dtypes is not None and dtypes[0] != dtypes[1]:
        return Cause(
            "dtype", f"its dtype is {dtypes[0]}, and must be that of its primal, {dtypes[1]}"
        )
    return None


def zero(pair: Pair) -> Cause | None:
    """Nothing comes back."""
    if np.abs(pair.ours).max() > pair.rounding or not pair.truth.any():
        return None
    name = f"`{pair.path}`" if pair.path else "this leaf"
    return Cause("zero", f"zero everywhere: the path through {name} is missing")


def spurious(pair: Pair) -> Cause | None:
    """Something comes back where the true gradient is zero."""
    if np.abs(pair.truth).max() > 1e-9 * np.abs(pair.ours).max():
        return None
    return Cause(
        "spurious",
        f"up to {np.abs(pair.ours).max():.3g}, where the true gradient is zero everywhere: "
        "the output does not depend on it",
    )


def constant_in_dy(pair: Pair) -> Cause | None:
    """The same whatever comes in."""
    if len(pair.ours) < 2 or not pair.vanishes(pair.ours - pair.ours[:1]):
        return None
    return Cause("dy ignored", "the same under every cotangent: dy is not used")


def scale(pair: Pair) -> Cause | None:
    """One factor, the same under every cotangent: a sign, a mean, a plain factor."""
    factor = float(fit(pair.ours, pair.truth))
    if factor == 0 or not pair.explains(factor * pair.truth):
        return None
    size = abs(factor)
    times = f"{size:.4g} x too large" if size > 1 else f"{1 / size:.4g} x too small"
    sign = ", and its sign is flipped" if factor < 0 else ""
    if math.isclose(size, 1, rel_tol=max(1e-5, 10 * pair.context.noise)) and factor < 0:
        return Cause("sign", "the sign is flipped")
    for power, large, small in _POWERS:
        for length, name in _lengths(pair):
            expected = length**power
            if math.isclose(size, expected, rel_tol=1e-3):
                return Cause("mean", f"{expected:.1f} x too large{sign}: {large.format(name)}")
            if math.isclose(size, 1 / expected, rel_tol=1e-3):
                return Cause("mean", f"{expected:.1f} x too small{sign}: {small.format(name)}")
        if math.isclose(max(size, 1 / size), 2, rel_tol=1e-3):
            break  # a factor of 2 is likelier than a root of 4
    near = f"{size - 1:+.2g}"
    digits = f"(1 {near[0]} {near[1:]})" if abs(size - 1) < 1e-4 else f"{size:.6g}"
    if abs(size - 1) < 0.1:
        return Cause("factor", f"{digits} x what it should be{sign}: a factor too many")
    return Cause("factor", f"{times}{sign}: a factor of {digits} too many")


def exchanged(pair: Pair) -> Cause | None:
    """The gradient of another argument, which has this one's."""
    for path, (ours, theirs) in pair.others.items():
        alike = ours.shape == theirs.shape == pair.truth.shape
        if alike and pair.explains(theirs) and pair.vanishes(ours - pair.truth, of=ours - theirs):
            return Cause("swapped", f"this and the gradient of `{path}` are swapped")
    return None


def swapped(pair: Pair) -> Cause | None:
    """The gradient of another argument."""
    for path, (_, theirs) in pair.others.items():
        if theirs.shape == pair.truth.shape and theirs.any() and pair.explains(theirs):
            return Cause("swapped", f"this is the gradient of `{path}`")
    return None


def other_cotangent(pair: Pair) -> Cause | None:
    """The gradient of another call."""
    for shift in range(1, len(pair.truth)):
        if pair.explains(np.roll(pair.truth, shift, 0)):
            return Cause("stale", "this is the gradient under the dy of another call: dy is stale")
    return None


def transposed(pair: Pair) -> Cause | None:
    """The axes in another order, or back to front."""
    ndim = len(pair.shape)
    for axes in itertools.permutations(range(ndim)) if ndim <= 4 else ():
        candidate = np.transpose(pair.truth, (0, *(axis + 1 for axis in axes)))
        if candidate.shape == pair.truth.shape and pair.explains(candidate):
            order = "" if ndim == 2 else f": its axes are in the order {axes}"
            return Cause("transposed", f"transposed{order}")
    for count in range(1, ndim + 1):
        for some in itertools.combinations(range(ndim), count):
            if pair.explains(np.flip(pair.truth, tuple(axis + 1 for axis in some))):
                return Cause("reversed", f"back to front along {_axes(some)}")
    return None


def rolled(pair: Pair) -> Cause | None:
    """Off by some places along an axis, or its slices in another order."""
    for axis, length in enumerate(pair.shape):
        ours, truth = (_some(side, axis + 1) for side in (pair.ours, pair.truth))
        for places in range(1, min(length - 1, FARTHEST) + 1):
            for shift in {places, -places}:
                here, there = _overlap(shift)
                if pair.hopeless(ours[here] - truth[there]):
                    continue
                if pair.explains(np.roll(pair.truth, shift, axis + 1)) or (
                    places <= length // 2 and _shifted(pair, axis + 1, shift)
                ):
                    return Cause("rolled", f"off by {shift:+d} along axis {axis} of {length}")
    for axis, length in enumerate(pair.shape):
        if 2 < length <= 512 and (order := _order(pair, axis + 1)) is not None:
            return Cause("permuted", f"the slices along axis {axis} are in another order: {order}")
    return None


def broadcast(pair: Pair) -> Cause | None:
    """Constant along an axis where the truth varies: summed over the wrong axis."""
    for axis, length in enumerate(pair.shape, 1):
        mean = pair.ours.mean(axis, keepdims=True)
        if length < 2 or not pair.vanishes(pair.ours - mean):
            continue
        sums = {"sum": pair.truth.sum(axis, keepdims=True)}
        sums["mean"] = sums["sum"] / length
        own = [name for name, value in sums.items() if pair.explains(value + 0 * pair.truth)]
        detail = (
            f"the {own[0]} of the true gradient over it" if own else "the truth varies along it"
        )
        return Cause(
            "broadcast", f"constant along axis {axis - 1}: summed over the wrong axis ({detail})"
        )
    return None


def offset(pair: Pair) -> Cause | None:
    """A constant, or a term without dy, is added."""
    if pair.ours[0].size < 2:
        return None
    if pair.vanishes(pair.difference - pair.difference.mean()):
        return Cause("offset", f"a constant {pair.difference.mean():.4g} is added everywhere")
    if len(pair.ours) > 1 and pair.vanishes(pair.difference - pair.difference[:1]):
        return Cause("offset", "a term is added that does not depend on dy")
    return None


def dropped(pair: Pair) -> Cause | None:
    """A term is missing, or too much, that has fewer dimensions than the leaf."""
    for axis, length in enumerate(pair.shape, 1):
        if length < 2:
            continue
        mean = pair.truth.mean(axis, keepdims=True)
        if pair.explains(pair.truth - mean):
            return Cause(
                "dropped", f"the mean over axis {axis - 1} is subtracted, and should not be"
            )
        if pair.vanishes(pair.difference - pair.difference.mean(axis, keepdims=True)):
            return Cause("dropped", f"a term constant along axis {axis - 1} is missing")
    rank = _rank(pair)
    if rank is not None:
        return Cause("dropped", f"a term of rank {rank} is missing: the difference has that rank")
    return None


def rounded(pair: Pair) -> Cause | None:
    """Rounded to fewer digits at the end."""
    if np.unique(pair.ours).size <= 4:
        return None
    for name, dtype in reversed(LOWER.items()):
        with np.errstate(over="ignore"):
            once = pair.ours.astype(dtype).astype(np.float64)
        unit = jnp.finfo(dtype)
        limit = float(unit.eps) * np.abs(pair.truth) + float(unit.smallest_subnormal)
        if np.array_equal(once, pair.ours) and np.all(np.abs(pair.difference) <= limit):
            return Cause("rounded", f"rounded to {name}: every element is a {name}")
    return None


def imprecise(pair: Pair) -> Cause | None:
    """Rounded to fewer digits on the way: errors of one size everywhere, unlike the gradient."""
    size = float(np.sqrt(np.mean(pair.truth**2)))
    if not size or pair.ours.size < 8 or abs(cosine(pair.difference, pair.truth)) > 0.5:
        return None
    worst, usual = (float(f(np.abs(pair.difference))) / size for f in (np.max, np.median))
    for name, dtype in LOWER.items():
        eps = float(jnp.finfo(dtype).eps)
        if eps / 32 < usual and worst <= 4 * eps:
            return Cause("rounded", f"off by up to {worst:.1e} of its size: as if run in {name}")
    return None


def local(pair: Pair) -> Cause | None:
    """Each slice or element has a factor of its own, whatever the cotangent."""
    if len(pair.ours) < 3 or pair.ours[0].size < 2:
        return None
    every = tuple(range(pair.ours.ndim))
    for axis, length in enumerate(pair.shape, 1):
        others = tuple(other for other in every if other != axis)
        factor = fit(pair.ours, pair.truth, others)
        if length > 1 and len(pair.shape) > 1 and pair.explains(factor * pair.truth):
            ends = f"{factor.min():.3g} to {factor.max():.3g}"
            return Cause(
                "slices", f"each slice along axis {axis - 1} has a factor of its own: {ends}"
            )
    bases = {"the truth": pair.truth}
    bases |= {
        f"dy of `{n}`": e for n, e in pair.context.errors.items() if e.shape == pair.ours.shape
    }
    for name, base in bases.items():
        factor = fit(pair.ours, base, (0,))
        if pair.explains(factor * base):
            within = pair.vanishes(pair.truth - fit(pair.truth, base, (0,)) * base)
            why = "another local derivative" if within else "what other elements send is missing"
            return Cause(
                "local",
                f"{name} times a factor for each element, from {factor.min():.3g} to "
                f"{factor.max():.3g}, the same under every cotangent: {why}",
            )
    return None


def nonlinear(pair: Pair) -> Cause | None:
    """Not a linear function of dy."""
    each = tuple(range(1, pair.ours.ndim))
    factors = fit(pair.ours, pair.truth, each)
    if pair.ours[0].size > 2 and pair.explains(factors * pair.truth):
        ends = f"{factors.min():.3g} to {factors.max():.3g}"
        return Cause("nonlinear", f"a factor of {ends}, another one under every cotangent")
    return None


def unknown(pair: Pair) -> Cause:
    """What is left: how similar the two are."""
    c, s = cosine(pair.ours, pair.truth), float(fit(pair.ours, pair.truth))
    if c > 0.99:
        off = np.linalg.norm(pair.difference) / np.linalg.norm(pair.truth)
        return Cause(
            "nearly", f"almost right (cosine {c:.6f}, off by {off:.1e}): a small term is another"
        )
    return Cause("unknown", f"no simple relation: cosine {c:.3f}, scale {s:.3g}")


def _lengths(pair: Pair) -> Iterator[tuple[int, str]]:
    """Lengths above 1 that a mean may be over, the likeliest first, and what they are."""
    batch = pair.context.batch
    if batch is not None and batch > 1:
        yield batch, f"the batch of {batch}"
    shapes = {pair.path or "this leaf": pair.shape, **pair.context.shapes}
    for path, lengths in shapes.items():
        for axis, length in enumerate(lengths):
            if length > 1:
                yield length, f"the {length} of axis {axis} of {path}"
    for path, lengths in shapes.items():
        for count in range(2, len(lengths) + 1):
            for first in range(len(lengths) - count + 1):
                some = lengths[first : first + count]
                if math.prod(some) > 1:
                    times = " x ".join(map(str, some))
                    yield math.prod(some), f"{times} elements of {path}"


def _axes(axes: tuple[int, ...]) -> str:
    return ("axis " if len(axes) == 1 else "axes ") + ", ".join(map(str, axes))


def _some(side: np.ndarray, axis: int) -> np.ndarray:
    """About `FEW` elements of an array for each place on an axis, which comes first."""
    rows = np.moveaxis(side, axis, 0).reshape(side.shape[axis], -1)
    return rows[:, :: max(1, rows.shape[1] // FEW)]


def _overlap(shift: int) -> tuple[slice, slice]:
    """Where an array that is moved by `shift` lies on what was there, and that."""
    if shift > 0:
        return slice(shift, None), slice(None, -shift)
    return slice(None, shift), slice(-shift, None)


def _shifted(pair: Pair, axis: int, shift: int) -> bool:
    """Whether ours is the truth moved along an axis, whatever fills the gap."""
    ours, truth = (np.moveaxis(side, axis, 0) for side in (pair.ours, pair.truth))
    here, there = _overlap(shift)
    wrong = ours[here] - truth[here]
    return bool(truth[there].any()) and pair.vanishes(ours[here] - truth[there], of=wrong)


def _order(pair: Pair, axis: int) -> str | None:
    """The permutation of slices along an axis that makes ours of the truth, if there is one."""
    ours, truth = (np.moveaxis(side, axis, 0) for side in (pair.ours, pair.truth))
    ours, truth = (side.reshape(len(side), -1) for side in (ours, truth))
    square = (ours**2).sum(1)[:, None] + (truth**2).sum(1) - 2 * ours @ truth.T
    order = square.argmin(1)
    if len(set(order.tolist())) < len(order) or not pair.vanishes(ours - truth[order]):
        return None
    return ", ".join(map(str, order[:8])) + (", ..." if len(order) > 8 else "")


def _rank(pair: Pair) -> int | None:
    """The rank of the difference, where it is far from full under every cotangent."""
    if len(pair.shape) < 2:
        return None
    matrices = pair.difference.reshape(len(pair.difference), -1, pair.shape[-1])
    full = min(matrices.shape[1:])
    if full < 3:
        return None
    values = np.linalg.svd(matrices, compute_uv=False)
    floor = np.maximum(1e-3 * values[:, :1], pair.rounding * full**0.5)
    rank = int((values > floor).sum(1).max())
    return rank if 0 < rank <= full // 3 else None
