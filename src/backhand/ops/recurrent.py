"""What recurrent ops share: how a sequence is laid out for a scan, lengths, and what is refused.

A recurrence reads its input one step at a time. What does not depend on the state is done for the
whole sequence at once: before the scan the product of the input with its weights; after the reverse
scan, which keeps only the errors of the gates, the gradient of each weight as one product.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import accumulation_dtype, by_batch, explicit_sharding, product, varying
from backhand.ops.lengths import check_lengths, present
from backhand.protocol import need_floating
from backhand.visit import PyTree


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A scan over time and the layout of its arrays.

    Attributes:
        columns: whether a step's arrays are (F, B), an example in a column, or (B, F).
        backwards: whether it begins at the last step.
    """

    columns: bool
    backwards: bool

    def sequence(self, x: Array) -> Array:
        """(B, T, F) as a scan has it: (T, F, B), or as it is."""
        return jnp.transpose(x, (1, 2, 0)) if self.columns else x

    def restored(self, xs: Array) -> Array:
        """What `sequence` was given: (B, T, F)."""
        return jnp.transpose(xs, (2, 0, 1)) if self.columns else xs

    def state(self, h: Array) -> Array:
        """(B, F) as a step has it, and back again."""
        return h.T if self.columns else h

    def vector(self, v: Array) -> Array:
        """(F,) to meet a step's arrays."""
        return v[:, None] if self.columns else v[None]

    def times(self, w: Array) -> Callable[[Array], Array]:
        """The product of a step's array with w (I, O), accumulated in at least float32.

        The operand is laid out once, outside the scan: contracting the wrong axis of it inside is
        4 to 20 times slower on CPU.
        """
        wide, operand = accumulation_dtype(w.dtype), self.state(w)

        def multiply(h: Array) -> Array:
            pair = (operand, h) if self.columns else (h, operand)
            return jnp.matmul(*pair, preferred_element_type=wide)

        return multiply

    def split(self, z: Array, parts: int) -> list[Array]:
        """A step's features in equal parts, one for each gate."""
        return jnp.split(z, parts, self._features)

    def join(self, parts: Sequence[Array]) -> Array:
        """The inverse of `split`."""
        return jnp.concatenate(parts, self._features)

    @property
    def _features(self) -> int:
        return 0 if self.columns else 1

    def before(self, first: Array, hs: Array) -> Array:
        """The states that each step began with, from those that it ended with."""
        time = 0 if self.columns else 1
        steps, first = hs.shape[time], jnp.expand_dims(first, time).astype(hs.dtype)
        if steps == 0:
            return hs
        rest = lax.slice_in_dim(hs, self.backwards, steps - 1 + self.backwards, axis=time)
        return jnp.concatenate((rest, first) if self.backwards else (first, rest), time)

    def run(self, step: Callable[..., Any], start: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        """`lax.scan` in the sweep's direction; `start` made to differ over devices as `xs` do.

        Of rows every step reads its own in place and writes where its results belong, with no copy
        of a sequence with time in front: both ways 0.85 to 1.05 of the time with such copies, and 5
        to 25% less memory. Under an explicit mesh it is the plain scan of such copies.
        """
        start = varying(start, xs)
        if self.columns:
            return lax.scan(step, start, xs, reverse=self.backwards)
        leaf = jax.tree.leaves(xs)[0]
        if leaf.shape[1] == 0 or explicit_sharding(leaf) is not None:
            last, ys = lax.scan(step, start, _swapped(xs), reverse=self.backwards)
            return last, _swapped(ys)
        return _in_place(step, start, xs, self.backwards)

    def back(self, step: Callable[..., Any], start: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        """The scan against the sweep's direction."""
        return dataclasses.replace(self, backwards=not self.backwards).run(step, start, xs)


def _swapped(tree: PyTree) -> PyTree:
    """Batch and time in each other's place."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def _in_place(
    step: Callable[..., Any], start: PyTree, xs: PyTree, backwards: bool
) -> tuple[PyTree, PyTree]:
    """`lax.scan` along the second axis of xs (B, T, F), with results (B, T, F)."""
    steps = jax.tree.leaves(xs)[0].shape[1]

    def at(t: Array | int) -> PyTree:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, t, 1, keepdims=False), xs)

    def body(carry: tuple[PyTree, PyTree], t: Array) -> tuple[tuple[PyTree, PyTree], None]:
        state, y = step(carry[0], at(t))
        ys = jax.tree.map(lambda ys, y: lax.dynamic_update_index_in_dim(ys, y, t, 1), carry[1], y)
        return (state, ys), None

    one = jax.eval_shape(lambda: step(start, at(0))[1])
    ys = jax.tree.map(lambda y: jnp.zeros((y.shape[0], steps, y.shape[1]), y.dtype), one)
    times = jnp.arange(steps, dtype=jnp.int32)
    return lax.scan(body, varying((start, ys), xs), times, reverse=backwards)[0]


ROWS_FROM = 16
"""The batch from which examples lie in rows.

Both ways on 2 CPU cores, columns against rows: 149 : 163 ms for an LSTM of 1024 units at batch 8,
where the weights are the larger operand and columns need no second copy of them; 221 : 204 ms for
512 units at batch 16.
"""


def sweep_of(x: Array, reverse: bool) -> Sweep:
    """A sweep over `x` (B, T, D) in the faster layout."""
    return Sweep(x.shape[0] < ROWS_FROM, reverse)


def kept(lengths: Array | None, steps: int) -> Array | None:
    """(B, T, 1): whether a step is within its sequence; None where all are."""
    return None if lengths is None else present(lengths, steps)[..., None]


def within(keep: Array | None, x: Array) -> Array:
    """`x` (B, T, F), zero after the end of its sequence whatever is there, NaN included."""
    return x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))


def steps_kept(sweep: Sweep, keep: Array | None) -> Array | None:
    """`kept` for the steps of a scan."""
    return None if keep is None else sweep.sequence(keep)


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
    for array in (wx, wh, *(bias for bias, _ in biases.values())):
        need_floating(name, array)
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
    if isinstance(state, tuple):
        raise ValueError(
            f"{name} needs one array {shape} for its state, got a tuple of {len(state)}"
        )
    need_floating(name, state)
    if state.shape != shape:
        raise ValueError(
            f"{name} needs the state {key} of shape (B, H) = {shape}, got {state.shape}"
        )
