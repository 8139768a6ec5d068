"""Dtype and sharding of a cotangent: the same as its primal's, in one place for the whole library.

A reverse pass multiplies and sums arrays whose dtype, sharding and varying mesh axes need not be
those of the array that the result is the cotangent of. Every product and sum that makes a cotangent
ends in `like_primal`, and every product goes through `contract`, so no op has to know about meshes.
On the way forward an activation stays split as it is: a parameter meets it through `product` or
`last_axis`.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that sums run in: the widest of `dtypes`, and at least float32."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def at_least(own: DTypeLike, dtype: DTypeLike) -> jnp.dtype:
    """`dtype`, or `own` where that has more bits; integers count as float32."""
    own = jnp.dtype(own) if jnp.issubdtype(own, jnp.floating) else jnp.dtype(jnp.float32)
    return own if own.itemsize > jnp.dtype(dtype).itemsize else jnp.dtype(dtype)


def number(what: str, value: Any) -> float:
    """The value as a float.

    Raises:
        TypeError: if it is no number.
    """
    try:
        if not isinstance(value, str | bool | complex):
            return float(value)
    except TypeError:
        pass
    raise TypeError(f"{what} must be a number, got {value!r}")


def flag(what: str, value: Any) -> bool:
    """The value as a bool.

    Raises:
        TypeError: if it is neither True nor False: text is true, "no" as well.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{what} must be True or False, got {value!r}")


def whole_number(what: str, value: Any) -> int:
    """The value as an int.

    Raises:
        TypeError: if it is not a whole number; True is none.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{what} must be a whole number, got {value!r}")


def described(x: Any) -> str:
    """What was given, for errors: 'an array of shape (2, 3)', 'a tuple of 2', 'a str'."""
    if hasattr(x, "shape"):
        return f"an array of shape {x.shape}"
    size = f" of {len(x)}" if isinstance(x, dict | tuple | list) else ""
    return f"a {type(x).__name__}{size}"


def need_array(name: str, what: str, x: Any, kind: str = "") -> None:
    """Refuses what is no array (of that kind), as a list of numbers is none.

    Raises:
        TypeError: saying what it is.
    """
    if not hasattr(x, "dtype"):
        of = f" of {kind}" if kind else ""
        raise TypeError(
            f"{name} needs {what} as an array{of}, got {described(x)}; jnp.asarray makes one of it"
        )


def need_integers(name: str, what: str, x: Any, advice: str = "") -> None:
    """Refuses what is no array of integers.

    Raises:
        TypeError: saying what it is.
    """
    need_array(name, what, x, "integers")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} needs integer {what}, got {x.dtype} of shape {x.shape}{advice}")


def need_mask(name: str, mask: Any, advice: str = "use mask != 0") -> None:
    """Refuses what is no array of booleans.

    Raises:
        TypeError: saying what it is.
    """
    need_array(name, "a mask", mask, "booleans")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name} needs a boolean mask, got {mask.dtype}; {advice}")


def need_floating_dtype(dtype: Any) -> None:
    """Refuses a setting `dtype` that is none of floating point.

    Raises:
        TypeError: for what is no dtype.
        ValueError: for one that is not floating-point, or has more bits than JAX is set to.
    """
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be one such as jnp.bfloat16, got {dtype!r}") from None
    if not jnp.issubdtype(known, jnp.floating):
        raise ValueError(f"dtype must be a floating-point one, got {known.name}")
    if jax.dtypes.canonicalize_dtype(known) != known:
        raise ValueError(
            f"dtype={known.name} needs JAX's 64 bits: jax.config.update('jax_enable_x64', True)"
        )


def upcast(x: Array) -> Array:
    """`x` in the dtype that reductions, normalisations and losses run in: at least float32."""
    return x.astype(accumulation_dtype(x.dtype))


def inverse(weight: Array) -> Array:
    """1 / weight; 0 for a weight of 0, so that nothing seen is a mean of 0 without a gradient."""
    return jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))


def last_axis(v: Array, x: Array) -> Array:
    """`v` (D,) with leading axes of length 1, to meet the last axis of `x` (..., D).

    Split as that axis is.
    """
    sharding = explicit_sharding(x)
    if sharding is not None:
        v = jax.sharding.reshard(v, sharding.update(spec=sharding.spec[-1:]))
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def is_floating(x: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `x` has a cotangent at all: real floating point, not integers, booleans or keys."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def explicit_sharding(like: Array | jax.ShapeDtypeStruct) -> NamedSharding | None:
    """The sharding of `like` where its mesh has explicit axes; None where the compiler decides."""
    sharding = jax.typeof(like).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def zeros_like(x: Array | jax.ShapeDtypeStruct, dtype: DTypeLike) -> Array:
    """Zeros of the shape and sharding of `x`, an array or what describes one.

    JAX 0.12's own forget an explicit mesh outside of `jax.set_mesh`, where `x` is replicated.
    """
    sharding = explicit_sharding(x)
    zeros = jnp.zeros_like(x, dtype)
    return zeros if sharding is None else jax.sharding.reshard(zeros, sharding)


def product(x: Array, w: Array) -> Array:
    """`x` (..., I) times `w` (I, O), in the dtype of `x`.

    Split as `x` is, and over O as `w` is unless that would split two axes over one of the mesh.
    """
    sharding = explicit_sharding(x)
    if sharding is not None:
        lead, own = sharding.spec[:-1], jax.typeof(w).sharding.spec[1]
        sharding = sharding.update(spec=(*lead, None if _axes((own,)) & _axes(lead) else own))
    axes = ((x.ndim - 1,), (0,))
    return lax.dot_general(x, w.astype(x.dtype), (axes, ((), ())), out_sharding=sharding)


def reshape_examples(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` (B, ...) as (B, *shape), the batch split as it was and each example whole."""
    sharding = explicit_sharding(x)
    if sharding is not None:
        sharding = sharding.update(spec=(sharding.spec[0], *[None] * len(shape)))
    return lax.reshape(x, (x.shape[0], *shape), out_sharding=sharding)


def by_batch(x: Array) -> Array:
    """Under an explicit mesh: split over the batch alone, each example whole."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=(sharding.spec[0], *[None] * (x.ndim - 1))))


def whole(w: Array) -> Array:
    """Under an explicit mesh: a parameter gathered, since every step needs all of it."""
    sharding = explicit_sharding(w)
    if sharding is None:
        return w
    return jax.sharding.reshard(w, sharding.update(spec=(None,) * w.ndim))


def varying(tree: Any, *like: Any) -> Any:
    """The tree, each leaf varying over the axes of a `shard_map` that any leaf of all varies over.

    A scan needs its carry to have the same type before and after a step.
    """
    leaves = jax.tree.leaves((tree, like))
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))

    def vary(leaf: Array) -> Array:
        extra = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return lax.pcast(leaf, extra, to="varying") if extra else leaf

    return jax.tree.map(vary, tree)


def like_primal(cotangent: Array, primal: Array) -> Array:
    """Gives `cotangent` the dtype, sharding and varying mesh axes of its `primal`.

    A parameter that is the same on every device of a `shard_map` axis, used with activations that
    differ there, has as its cotangent the sum over that axis.

    Raises:
        ValueError: if the shapes differ; a cotangent has the shape of its primal.
    """
    if cotangent.shape != primal.shape:
        raise ValueError(
            f"a cotangent has the shape of its primal {primal.shape}, got {cotangent.shape}"
        )
    varying = jax.typeof(cotangent).manual_axis_type.varying
    extra = tuple(sorted(varying - jax.typeof(primal).manual_axis_type.varying))
    if extra:
        cotangent = lax.psum(cotangent, extra)
    sharding = explicit_sharding(primal)
    if sharding is not None and jax.typeof(cotangent).sharding.spec != sharding.spec:
        cotangent = jax.sharding.reshard(cotangent, sharding)
    return cotangent.astype(primal.dtype)


def contract(a: Array, b: Array, axes: tuple[Sequence[int], Sequence[int]], like: Array) -> Array:
    """The product of `a` and `b` summed over `axes` of each, as the cotangent of `like`.

    Accumulates in at least float32, whatever the dtype of `a` and `b`.
    """
    product = lax.dot_general(
        a,
        b,
        (axes, ((), ())),
        preferred_element_type=accumulation_dtype(a.dtype, b.dtype),
        out_sharding=explicit_sharding(like),
    )
    return like_primal(product, like)


def outer(x: Array, dy: Array, like: Array) -> Array:
    """The cotangent of `like` (I, O): `x` (..., I) times `dy` (..., O), summed over leading axes.

    Accumulates in at least float32, whatever the dtype of `x` and `dy`.
    """
    if explicit_sharding(x) is None:
        return like_primal(outer_product(x, dy), like)
    lead = tuple(range(x.ndim - 1))
    return contract(x, dy, (lead, lead), like)


LARGE, LONG, SMALL = 1 << 16, 1 << 29, 1 << 19
"""The numbers of a gradient, or the terms of all its sums, from which it is taken on CPU from rows,
and the terms below which it is too.

In float32 that took 0.7 of the time for weights of 256 x 256 in an Elman network and 0.9 for 1 x 1
convolutions of 32x28x28x128 to 256, with 0.7 to 0.9 of the rounding; between, 64 to 64 features
took 1.1 to 1.8 of it. Small sums take as long, and round less.
"""


@functools.partial(jax.jit, inline=True)
def outer_product(x: Array, dy: Array) -> Array:
    """The sum over all leading axes of `x` (..., I) times `dy` (..., O), in at least float32.

    Of several leading axes XLA turns a copy of `x`, and sums in an order that rounds more. Where
    that is slower they are one axis here, of rows.
    """
    features, outputs = x.shape[-1], dy.shape[-1]
    rows, size = math.prod(x.shape[:-1]), features * outputs

    def product(x: Array, dy: Array) -> Array:
        lead, wide = tuple(range(x.ndim - 1)), accumulation_dtype(x.dtype, dy.dtype)
        return lax.dot_general(x, dy, ((lead, lead), ((), ())), preferred_element_type=wide)

    def of_rows(x: Array, dy: Array) -> Array:
        return product(x.reshape(rows, features), dy.reshape(rows, outputs))

    as_one = size >= LARGE or rows * size >= LONG or rows * size < SMALL
    split = jax.local_device_count("cpu") > 1  # an axis split over several devices would be moved
    if x.ndim < 3 or not x.dtype == dy.dtype == jnp.float32 or split or not as_one:
        return product(x, dy)
    return lax.platform_dependent(x, dy, cpu=of_rows, default=product)


WIDE, FEW = 1 << 13, 32
"""Sums of leading axes that are at least so wide are taken on CPU in groups of so many rows.

With JAX 0.10 XLA sums wide rows there a column at a time: 8 rows of 262,144 took 22 ms, 0.3 ms so;
2,048 of 32,000 took 560 and 17 ms, with 1/32 of their memory. JAX 0.12 took 0.4 and 20 ms.
"""


def sum_leading(x: Array, rank: int, dtype: jnp.dtype) -> Array:
    """The sum over all but the last `rank` axes, in `dtype`."""
    axes = tuple(range(x.ndim - rank))
    rows, width = math.prod(x.shape[: len(axes)]), math.prod(x.shape[len(axes) :])
    copied = x.dtype != dtype and rows > 8  # XLA would convert all of x before it is cut
    split = explicit_sharding(x) is not None or jax.local_device_count("cpu") > 1
    if rows < 2 or width < WIDE or copied or split:  # rows cut on several devices would move
        return jnp.sum(x, axes, dtype=dtype)

    def on_cpu(x: Array) -> Array:
        return _by_rows(x.reshape(rows, *x.shape[len(axes) :]).astype(dtype))

    return lax.platform_dependent(x, cpu=on_cpu, default=lambda x: jnp.sum(x, axes, dtype=dtype))


def in_pairs(parts: Sequence[Array]) -> Array:
    """The sum of at least one array, of neighbours first: rounded less than one after the other."""
    while len(parts) > 1:
        odd = parts[len(parts) & ~1 :]
        parts = [*(a + b for a, b in zip(parts[::2], parts[1::2], strict=False)), *odd]
    return parts[0]


def _by_rows(x: Array) -> Array:
    """The sum over the first axis (R, ...): of up to FEW parts in pairs, then of what is left."""
    count = min(len(x), FEW)
    size = len(x) // count
    total = in_pairs([x[i * size : (i + 1) * size] for i in range(count)])
    rest = x[count * size :]
    total = total[0] if size == 1 else _by_rows(total)
    return total + _by_rows(rest) if len(rest) else total


def one_by_one(f: Callable[[Any], Any], xs: Any) -> Any:
    """`f` of each example in turn, stacked: one in memory at a time.

    A scan cannot run along an axis that an explicit mesh splits over its devices. There it is all
    of a device's examples at once.
    """
    sharding = explicit_sharding(jax.tree.leaves(xs)[0])
    split = sharding is not None and sharding.spec[0] is not None
    return jax.vmap(f)(xs) if split else lax.map(f, xs)


def _axes(spec: Sequence[str | tuple[str, ...] | None]) -> set[str]:
    """The mesh axes that a partition spec names."""
    names = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return {name for entry in names for name in entry if name is not None}
