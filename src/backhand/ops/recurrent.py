"""What recurrent ops share: the scan over a sequence, lengths, and what is refused.

A recurrence reads its input one step at a time. What does not depend on the state is done for the
whole sequence at once: before the scan the product of the input with its weights; after the reverse
scan, which keeps only the errors of the gates, the gradient of each weight as one product.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import (
    accumulation_dtype,
    by_batch,
    described,
    explicit_sharding,
    flag,
    is_floating,
    product,
    upcast,
    varying,
)
from backhand.ops.lengths import check_lengths, present
from backhand.protocol import need_floating
from backhand.visit import PyTree


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A scan over time, and how a step is multiplied.

    Attributes:
        turned: whether a product of a step's array (B, F) is taken of its transpose.
        backwards: whether it begins at the last step.
    """

    turned: bool
    backwards: bool

    def times(self, w: Array) -> Callable[[Array], Array]:
        """The product of a step's array with w (I, O), accumulated in at least float32.

        The operand is laid out once, outside the scan: contracting the wrong axis of it inside is
        4 to 20 times slower on CPU. XLA would turn a turned product back; it does not see that the
        choice changes nothing.
        """
        wide, operand = accumulation_dtype(w.dtype), w.T if self.turned else w

        def multiply(h: Array) -> Array:
            if not self.turned:
                return jnp.matmul(h, operand, preferred_element_type=wide)
            z = jnp.matmul(operand, h.T, preferred_element_type=wide)
            return jnp.where(z == z, z, jnp.nan).T

        return multiply

    def before(self, first: Array, hs: Array) -> Array:
        """The states that each step began with, from those that it ended with."""
        steps, first = hs.shape[1], first[:, None].astype(hs.dtype)
        if steps == 0:
            return hs
        rest = lax.slice_in_dim(hs, self.backwards, steps - 1 + self.backwards, axis=1)
        return jnp.concatenate((rest, first) if self.backwards else (first, rest), 1)

    def run(self, step: Callable[..., Any], start: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        """`lax.scan` in the sweep's direction; `start` made to differ over devices as `xs` do.

        Every step reads its own in place and writes where its results belong, with no copy of a
        sequence with time in front: of rows, both ways 0.85 to 1.05 of the time with such copies,
        and 5 to 25% less memory. A result of the shape of an input takes its place, which saves an
        LSTM a quarter of its memory. Under an explicit mesh it is the plain scan of copies.
        """
        return self._steps(step, start, xs, replace=True)

    def back(self, step: Callable[..., Any], start: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        """The scan against the sweep's direction.

        Results have places of their own: an input that is read in several places, as the gates are
        here, XLA would copy at each step before it is written to.
        """
        against = dataclasses.replace(self, backwards=not self.backwards)
        return against._steps(step, start, xs, replace=False)

    def _steps(
        self, step: Callable[..., Any], start: PyTree, xs: PyTree, replace: bool
    ) -> tuple[PyTree, PyTree]:
        start, leaf = varying(start, xs), jax.tree.leaves(xs)[0]
        if leaf.shape[1] == 0 or explicit_sharding(leaf) is not None:
            last, ys = lax.scan(step, start, _swapped(xs), reverse=self.backwards)
            return last, _swapped(ys)

        here = functools.partial(self._in_place, step, replace)
        if all(_wide(x) is x for x in jax.tree.leaves(xs)):
            return here(start, xs)
        on_cpu = functools.partial(self._in_float32, step, replace)
        return lax.platform_dependent(start, xs, cpu=on_cpu, default=here)

    def _in_place(
        self, step: Callable[..., Any], replace: bool, start: PyTree, xs: PyTree
    ) -> tuple[PyTree, PyTree]:
        """`lax.scan` over time where it lies."""
        given, structure = jax.tree.flatten(xs)
        steps = given[0].shape[1]

        def read(arrays: Sequence[Array], t: Array | int) -> PyTree:
            own = [lax.dynamic_index_in_dim(x, t, 1, keepdims=False) for x in arrays]
            return jax.tree.unflatten(structure, own)

        one, made = jax.tree.flatten(jax.eval_shape(lambda: step(start, read(given, 0))[1]))
        arrays, places = list(given), []
        for y in one:
            shape = (len(y), steps, *y.shape[1:])
            same = (i for i, x in enumerate(given) if (x.shape, x.dtype) == (shape, y.dtype))
            place = next((i for i in same if replace and i not in places), len(arrays))
            if place == len(arrays):
                arrays.append(jnp.zeros(shape, y.dtype))
            places.append(place)

        def body(carry: tuple[PyTree, list[Array]], t: Array) -> tuple[PyTree, None]:
            state, arrays = carry
            state, ys = step(state, read(arrays[: len(given)], t))
            for i, y in zip(places, jax.tree.leaves(ys), strict=True):
                arrays[i] = lax.dynamic_update_index_in_dim(arrays[i], y, t, 1)
            return (state, arrays), None

        carry, times = varying((start, arrays), xs), jnp.arange(steps, dtype=jnp.int32)
        (last, arrays), _ = lax.scan(body, carry, times, reverse=self.backwards)
        return last, jax.tree.unflatten(made, [arrays[i] for i in places])

    def _in_float32(
        self, step: Callable[..., Any], replace: bool, start: PyTree, xs: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The same, with all that is read and written in float32, rounded before and after.

        XLA on CPU has no bfloat16 of its own: to write one step of a sequence it converts all of it
        to float32 and back, at every step.
        """
        first = jax.tree.map(lambda x: lax.index_in_dim(x, 0, 1, keepdims=False), xs)
        one = jax.eval_shape(step, start, first)[1]

        def wide(state: PyTree, own: PyTree) -> tuple[PyTree, PyTree]:
            state, ys = step(state, own)
            return state, jax.tree.map(_wide, ys)

        last, ys = self._in_place(wide, replace, start, jax.tree.map(_wide, xs))
        return last, jax.tree.map(lambda y, like: y.astype(like.dtype), ys, one)


def _swapped(tree: PyTree) -> PyTree:
    """Arrays (B, T, ...) with time in front, and back again."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def _wide(x: Array) -> Array:
    """What is floating point in at least float32."""
    return upcast(x) if is_floating(x) else x


TURNED_FROM = 1 << 19
"""Elements of the state's weights from which products are turned.

Both ways on 2 CPU cores, turned : not, an LSTM of 384 units takes 0.92 of the time at batch 8, of
512 units 0.84 to 0.92 at batch 16 and 32, of 256 units 1.00 to 1.09; GRU and Elman alike.
"""


def sweep_of(x: Array, wh: Array, reverse: bool) -> Sweep:
    """A sweep over `x` (B, T, D) in the faster form for a state with the weights `wh` (H, G).

    What is not turned needs a copy of the weights on the way back, so that it is for sequences that
    outweigh it.
    """
    batch, steps, _ = x.shape
    turned = wh.size >= TURNED_FROM or batch * steps < len(wh)
    return Sweep(turned, flag("reverse", reverse))


def kept(lengths: Array | None, steps: int) -> Array | None:
    """(B, T, 1): whether a step is within its sequence; None where all are."""
    return None if lengths is None else present(lengths, steps)[..., None]


def within(keep: Array | None, x: Array) -> Array:
    """`x` (B, T, F), zero after the end of its sequence whatever is there, NaN included."""
    return x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))


def chosen(keep: Array | None, new: Array, old: Array) -> Array:
    """The new state within the sequence, the old one after its end."""
    return new if keep is None else jnp.where(keep, new, old)


def projected(x: Array, w: Array, b: Array) -> Array:
    """X w + b for the whole sequence (B, T, F), before the scan."""
    return product(x, w) + b.astype(x.dtype)[None, None]


def start(state: Array | None, x: Array, units: int) -> Array:
    """The initial state (B, H) in at least float32; zeros where none is given."""
    wide = accumulation_dtype(x.dtype)
    if state is not None:
        return by_batch(state).astype(x.dtype).astype(wide)
    zeros, sharding = jnp.zeros((x.shape[0], units), wide), explicit_sharding(x)
    if sharding is not None:
        zeros = jax.sharding.reshard(zeros, sharding.update(spec=(sharding.spec[0], None)))
    return varying(zeros, x)


def check(
    name: str,
    gates: int,
    x: Array,
    weights: tuple[Array, Array],
    biases: dict[str, tuple[Array, int]],
    state: dict[str, Array | None],
    lengths: Array | None,
) -> None:
    """Refuses arguments that do not fit each other.

    Args:
        name: of the op.
        gates: how many times H the weights are wide.
        x: inputs.
        weights: wx and wh.
        biases: by name, each with how many times H it is long.
        state: the initial states by name.
        lengths: of the sequences, or None.

    Raises:
        TypeError: for an input that is not floating point, or lengths that are not integers.
        ValueError: for shapes that do not fit, or lengths outside [0, T].
    """
    check_sequence(name, x)
    (batch, steps, features), (wx, wh) = x.shape, weights
    own = {"wx": wx, "wh": wh, **{key: bias for key, (bias, _) in biases.items()}}
    for key, array in own.items():
        need_floating(name, array, key)
    times = f"{gates} H" if gates > 1 else "H"
    units = wh.shape[0] if wh.ndim else 0
    if wh.shape != (units, gates * units) or wx.shape != (features, gates * units):
        raise ValueError(
            f"{name} needs weights wx (D, {times}) and wh (H, {times}) for x (B, T, D) of shape "
            f"{x.shape}, got {wx.shape} and {wh.shape}"
        )
    for key, (bias, wide) in biases.items():
        if bias.shape != (wide * units,):
            raise ValueError(f"{name} needs {key} of shape {(wide * units,)}, got {bias.shape}")
    for key, given in state.items():
        if given is not None:
            check_state(name, key, given, (batch, units))
    if lengths is not None:
        check_lengths(name, lengths, batch, steps, "the steps of x")


def check_sequence(name: str, x: Array | jax.ShapeDtypeStruct) -> None:
    """Refuses what is not a batch of sequences.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if it is not of rank 3.
    """
    need_floating(name, x)
    if len(x.shape) != 3:
        raise ValueError(
            f"{name} needs x of shape (B, T, D), got {x.shape}; a single sequence is a batch of "
            "one, x[None], and a feature an axis of its own, x[..., None]"
        )


def check_state(name: str, key: str, state: Any, shape: tuple[int, int]) -> None:
    """Refuses an initial state of another shape.

    Raises:
        TypeError: if it is not floating point.
        ValueError: if it is not one array, or its shape is not (B, H).
    """
    if not hasattr(state, "shape"):
        raise ValueError(f"{name} needs one array {shape} for its state, got {described(state)}")
    need_floating(name, state, key)
    if state.shape != shape:
        raise ValueError(
            f"{name} needs the state {key} of shape (B, H) = {shape}, got {state.shape}"
        )
