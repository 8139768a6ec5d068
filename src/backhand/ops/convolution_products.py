"""The three products of a convolution: of input and weight, of error and weight, of both with each.

Over the places p, the kernel's taps k and the channels i and o, with q = s p + d k - lo:

    correlate    y[p, o]    = sum_{k, i} x[q, i] w[k, i, o]
    scatter      x[q, i]    = sum_{k, o} y[p, o] w[k, i, o]      over the p and k that q is made of
    weights      w[k, i, o] = sum_p      x[q, i] y[p, o]

One sum over the triples (x, w, y) that meet: each product leaves out one of the three. What is
outside of the input is zero. Channels may be split into groups, each with its own outputs.

Here it is chosen how each is computed; any way gives the same numbers. They are jitted, for what is
called outside of a program would be compiled at every call: loops over blocks are new functions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import explicit_sharding, outer_product, product
from backhand.ops import (
    convolution_depthwise,
    convolution_lax,
    convolution_planes,
    convolution_rows,
)
from backhand.ops.convolution_columns import weights_by_columns
from backhand.ops.convolution_geometry import Geometry
from backhand.ops.convolution_groups import by_groups

X = Float[Array, "B *S I"]
Y = Float[Array, "B *P O"]
W = Float[Array, "*K J O"]
Product = Callable[[Array, Array], Array]
Way = functools.partial[Array]

SMALL = 1 << 18
"""Elements that all columns would have, up to which XLA's own way is as fast on CPU."""

MANY = 1 << 28
"""Terms of a weight's gradient from which `convolution_rows` took 0.6 to 0.9 of the time of XLA's
own on CPU; below, 0.7 to 1.9 of it. It adds up gradients block by block: of a weight with more than
half of the numbers of input or output (3x3, 32x4x4x512 to 512) XLA's own took 0.8 of its time and
half of its memory. Half as many in bfloat16, both ways back together: 16x16x16x64 by 3x3 to 64 took
0.8 of the time of XLA's own."""

NARROW = 16
"""Channels of a group, in and out, up to which its rows are shifted on CPU: 8x56x56x128 by 3x3 in
32 groups took 0.7 of the time of XLA's own convolution of each, 8x28x28x128 dilated by 2 0.4 of it,
32x16x16x64 in 8 groups 0.9, 8x14x14x512 in 32 groups 1.0, with half of the rounding."""

LARGE = 1 << 16
"""Numbers of a tap, times the places in a row, from which shifting rows pays on CPU."""

WIDE = 8
"""Outputs of a channel from which a depthwise weight's gradient is a product of matrices for each
group, where there are more errors than fit in a block, or four times as many outputs: 8x28x28x32 by
3x3 to 16 outputs each took 0.3 of the time of sums, to 8 outputs 1.1 of it and an eighth of the
memory; 4x8x8x2 to 128 outputs a twentieth of the time; 4x16x16x2 to 32 outputs a third to 1.4 of
it, with 4 times the rounding."""

UNROLLED = 64
"""Taps that are written out, each with its slice; beyond them a program would be too long."""


@functools.partial(jax.jit, static_argnames=("windows",), inline=True)
def correlate(x: X, w: W, windows: Geometry) -> Y:
    """What every place sees: y (B, *P, O) of x (B, *S, I) and w (*K, I / groups, O)."""
    if _pointwise(w.shape[:-2], windows):
        return product(x, w.reshape(w.shape[-2:]))
    everywhere = functools.partial(convolution_lax.correlate, windows=windows)
    if _in_groups(w.shape[-2], windows):
        narrow = _narrow(x, w, windows, windows)
        way = convolution_rows.correlate if narrow else correlate
        one = functools.partial(way, windows=windows.of_one_group)
        on_cpu = functools.partial(by_groups, one, windows.groups)
    elif _in_planes(windows, w.shape, x.size):
        on_cpu = functools.partial(convolution_planes.correlate, correlate, windows=windows)
    else:
        on_cpu = functools.partial(_on_cpu(x, w, windows, windows).correlate, windows=windows)
    return _chosen(everywhere, on_cpu, x, w)


@functools.partial(jax.jit, static_argnames=("windows", "sizes"), inline=True)
def scatter(y: Y, w: W, windows: Geometry, sizes: tuple[int, ...]) -> X:
    """What every place gives back: x (B, *sizes, I) of y (B, *P, O) and w (*K, I / groups, O)."""
    if _pointwise(w.shape[:-2], windows):
        return product(y, w.reshape(w.shape[-2:]).T)
    everywhere = functools.partial(convolution_lax.scatter, windows=windows, sizes=sizes)
    if _in_groups(w.shape[-2], windows):
        back = windows.way_back(sizes, w.shape[:-2])
        narrow = _narrow(y, w, windows, back)
        way = convolution_rows.scatter if narrow else scatter
        one = functools.partial(way, windows=windows.of_one_group, sizes=sizes)
        on_cpu = functools.partial(by_groups, one, windows.groups)
    elif _in_planes(windows, w.shape, y.size):
        way = functools.partial(convolution_planes.scatter, scatter)
        on_cpu = functools.partial(way, windows=windows, sizes=sizes)
    else:
        how = _on_cpu(y, w, windows, windows.way_back(sizes, w.shape[:-2]))
        on_cpu = functools.partial(how.scatter, windows=windows, sizes=sizes)
    return _chosen(everywhere, on_cpu, y, w)


@functools.partial(jax.jit, static_argnames=("windows", "kernel"), inline=True)
def weights(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> W:
    """What every tap joined: w (*kernel, I / groups, O) of x (B, *S, I) and y (B, *P, O).

    Accumulated, and given, in at least float32.
    """
    sharding = explicit_sharding(x)
    if _pointwise(kernel, windows) and sharding is None:
        dw = outer_product(x, y)
        return dw.reshape(*kernel, *dw.shape)
    everywhere = functools.partial(convolution_lax.weights, windows=windows, kernel=kernel)
    if sharding is not None:
        whole = sharding.update(spec=(None,) * x.ndim)
        return _by_the_compiler(everywhere, whole)(x, y)
    few = y.shape[-1] <= 4 * WIDE * x.shape[-1] and y.size <= convolution_depthwise.JOINED
    many = windows.groups > 1 and y.shape[-1] >= WIDE * x.shape[-1] and not few
    in_groups = _in_groups(x.shape[-1] // windows.groups, windows)
    by_rows = _shifts(x, windows, kernel) and not _large(x, y, math.prod(kernel), windows.groups)
    if in_groups and by_rows and not many:
        on_cpu = functools.partial(convolution_rows.weights, windows=windows, kernel=kernel)
        if max(x.shape[-1], y.shape[-1]) <= NARROW * windows.groups:
            one = functools.partial(on_cpu, windows=windows.of_one_group)
            on_cpu = functools.partial(by_groups, one, windows.groups)
    elif many or in_groups:
        one = functools.partial(weights, windows=windows.of_one_group, kernel=kernel)
        on_cpu = functools.partial(by_groups, one, windows.groups)
    elif _in_planes(windows, (*kernel, x.shape[-1], y.shape[-1]), max(x.size, y.size)):
        way = functools.partial(convolution_planes.weights, weights)
        on_cpu = functools.partial(way, windows=windows, kernel=kernel)
    else:
        how = _weights_on_cpu(x, y, windows, kernel)
        on_cpu = functools.partial(how, windows=windows, kernel=kernel)
    return _by_platform(everywhere, on_cpu, x, y)


@functools.partial(jax.jit, static_argnames=("windows",), inline=True)
def scatter_and_weights(x: X, y: Y, w: W, windows: Geometry) -> tuple[X, W]:
    """What every place gives back to x, and what every tap joined: the way back of `correlate`."""

    def apart(x: X, y: Y, w: W) -> tuple[X, W]:
        dx = scatter(y, w, windows, x.shape[1:-1])
        return dx, weights(x, y, windows, w.shape[:-2])

    if explicit_sharding(x) is not None or not _together_on_cpu(x, y, w, windows):
        return apart(x, y, w)
    on_cpu = functools.partial(convolution_rows.scatter_and_weights, windows=windows)
    return lax.platform_dependent(x, y, w, cpu=on_cpu, default=apart)


@dataclasses.dataclass(frozen=True)
class Weights:
    """`weights` at the places of given windows, as `backhand.Windows` calls it."""

    windows: Geometry

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return self.windows.rank

    def __call__(self, x: X, y: Y, kernel: tuple[int, ...]) -> W:
        """The gradient of the weight."""
        return weights(x, y, self.windows, kernel)


def _pointwise(kernel: Sequence[int], windows: Geometry) -> bool:
    """Whether it is a product of matrices: every place sees the input there, and all channels."""
    plain = windows.unit and windows.groups == 1
    return plain and set(kernel) == {1} and not any(map(sum, windows.padding))


def _in_groups(channels: int, windows: Geometry) -> bool:
    """Whether groups, of so many channels, are taken one after another on CPU.

    XLA goes through the channels of all: 32x16x16x64 by 3x3 to 64 took it 2.3 times as long in 2
    groups, 2 times in 8.
    """
    return windows.groups > 1 and channels > 1


def _narrow(x: Array, w: W, windows: Geometry, moving: Geometry) -> bool:
    """Whether groups of x, over which `moving` goes, are taken by rows."""
    if not _shifts(x, windows, w.shape[:-2]):
        return False
    channels = x.shape[-1] // windows.groups
    others = math.prod(w.shape[-2:]) // x.shape[-1]
    own = (*x.shape[:-1], channels)
    one = convolution_rows.one_example(own, w.shape[:-2], others, moving)
    return max(channels, others) <= NARROW and one <= convolution_rows.TOGETHER


def _shifts(x: Array, windows: Geometry, kernel: Sequence[int]) -> bool:
    """Whether several taps go over rows and columns one at a time, in a dtype of fast products.

    bfloat16 is left to XLA: the weight's gradient of 8x14x14x512 in 32 groups took 4 times as long.
    """
    by_one = windows.rank == 2 and set(windows.stride) == {1}
    return by_one and 1 < math.prod(kernel) <= UNROLLED and x.dtype.itemsize >= 4


def _in_planes(windows: Geometry, w: tuple[int, ...], most: int) -> bool:
    """Whether a convolution of one group, over three axes, is one over two on CPU.

    Not where its weight, of shape w, has more than half of the numbers of input or output, `most`:
    2x4x4x4x256 to 256 took 2.2 times as long so.
    """
    small = w[0] <= UNROLLED and 2 * math.prod(w) <= most
    return windows.rank == 3 and windows.groups == 1 and small


def _on_cpu(x: Array, w: W, windows: Geometry, moving: Geometry) -> ModuleType:
    """How `correlate` or `scatter` is computed on CPU: the kernel moves over x as `moving` says.

    Dilated kernels are left to XLA: 16x32x32x32 by 3x3 to 32 took 1.3 of its time by shifted rows.
    """
    taps = math.prod(w.shape[:-2])
    if w.shape[-2] == 1 and taps <= UNROLLED:
        return convolution_depthwise
    plain = windows.rank == 2 and windows.unit and taps <= UNROLLED
    wide = x.dtype.itemsize >= 4 and min(w.shape[-2:]) >= 128
    if not plain or wide or not _fast_products(x):
        return convolution_lax
    large = w.shape[-2] * w.shape[-1] * moving.places(x.shape[1:-1], w.shape[:2])[1] >= LARGE
    outputs = math.prod(w.shape[-2:]) // x.shape[-1]
    one = convolution_rows.one_example(x.shape, w.shape[:-2], outputs, moving)
    fits = one <= convolution_rows.TOGETHER
    return convolution_rows if large and fits else convolution_lax


def _weights_on_cpu(x: X, y: Y, windows: Geometry, kernel: tuple[int, ...]) -> Callable[..., Array]:
    """How `weights` is computed on CPU."""
    taps, unit = math.prod(kernel), set(windows.stride) == {1}
    if taps > UNROLLED:
        return convolution_lax.weights
    if windows.groups > 1:  # of one channel each: others go one after another
        return convolution_depthwise.weights
    # Over one axis XLA's own took 0.7 of the time of columns, for causal kernels of 3 and 4.
    if x.size * taps <= SMALL or (windows.rank == 1 and unit):
        return convolution_lax.weights
    if windows.rank == 2 and unit:
        many = _many(x, y, taps, MANY)
        return convolution_rows.weights if many else convolution_lax.weights
    if windows.rank == 3 and _large(x, y, taps):
        return convolution_lax.weights
    return weights_by_columns


def _together_on_cpu(x: X, y: Y, w: W, windows: Geometry) -> bool:
    """Whether both ways back shift the same columns, and those of an example fit.

    64x32x32x32 by 3x3 to 32 took 0.98 of the time apart, 64x16x16x64 to 64 0.86, 64x8x8x128 to 128
    0.93.
    """
    kernel = w.shape[:-2]
    if _pointwise(kernel, windows) or not _fast_products(x):
        return False
    by_rows = _weights_on_cpu(x, y, windows, kernel) is convolution_rows.weights
    if x.dtype.itemsize < 4:
        back = windows.way_back(x.shape[1:-1], kernel)
        by_rows = _on_cpu(y, w, windows, back) is convolution_rows and windows.groups == 1
        by_rows = by_rows and _many(x, y, math.prod(kernel), MANY // 2)
    most = convolution_rows.most_of(x.size, y.size)
    return by_rows and convolution_rows.one_example_back(x, w, windows) <= most


def _many(x: X, y: Y, taps: int, least: int) -> bool:
    """Whether a weight's gradient has so many terms, and is small beside input and output."""
    return y.size * taps * x.shape[-1] >= least and not _large(x, y, taps)


def _large(x: X, y: Y, taps: int, groups: int = 1) -> bool:
    """Whether a weight has more than half of the numbers of input or output."""
    return 2 * taps * x.shape[-1] * y.shape[-1] // groups > max(x.size, y.size)


def _fast_products(x: Array) -> bool:
    """Whether XLA's products of this dtype on CPU are as fast as its convolutions."""
    return x.dtype.itemsize >= 4 or x.dtype == jnp.bfloat16


def _chosen(everywhere: Way, on_cpu: Way, x: Array, w: Array) -> Array:
    """One way on CPU, another elsewhere; under an explicit mesh split over the batch as x is."""
    sharding = explicit_sharding(x)
    if sharding is not None:
        spec = (sharding.spec[0], *[None] * (x.ndim - 1))
        return _by_the_compiler(everywhere, sharding.update(spec=spec))(x, w)
    return _by_platform(everywhere, on_cpu, x, w)


def _by_platform(everywhere: Way, on_cpu: Way, *arrays: Array) -> Array:
    """One way on CPU, another elsewhere, where they differ."""
    if on_cpu.func is everywhere.func:
        return everywhere(*arrays)
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=everywhere)


def _by_the_compiler(run: Product, sharding: jax.sharding.NamedSharding) -> Product:
    """`run` with its inside placed by the compiler: windows have no rule for explicit axes."""
    placed: Product = jax.sharding.auto_axes(run, out_sharding=sharding)
    return placed
