"""One layer many times over, by a scan over depth."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from backhand.arrays import whole_number
from backhand.combinators.common import around, keys_of, same_shape, with_key
from backhand.contributions import Leaf
from backhand.protocol import Layer, Static, output_shape, shapes_of
from backhand.visit import Collect, Params, PyTree, Residuals, Summed, gradients


def repeat(inner: Layer, depth: int) -> Layer:
    """The layer applied `depth` times, each time with parameters of its own: one `lax.scan`.

    Parameters are those of `inner` stacked on a leading axis, so the program is compiled once
    whatever the depth. Residuals are stacked too, but an array that a residual shares with another
    is stored once, and so is one that every step passes on unchanged (a context beside x that all
    steps read; its errors add up through the scan).

    What is stored of a step is a choice. `repeat(checkpoint(block), depth)` stores its input alone
    and computes the block again on the way back. A `checkpoint` around a part of the block does so
    for that part, whose input is stored; the rest of the block keeps its residuals.

    Args:
        inner: from x to an output of its shape and dtype.
        depth: how many times.

    Raises:
        TypeError: if depth is not an integer.
        ValueError: if depth < 1, or the layer changes the shape or dtype of its input.

    Example:
        >>> import backhand as bh
        >>> x, key = jnp.ones((2, 4)), jax.random.key(0)
        >>> wide = bh.chain(bh.dense(64), bh.gelu(), bh.dense(4))
        >>> def stored(block):
        ...     layer = repeat(block, 3)
        ...     y, residuals = layer.forward(layer.init(key, x), x)
        ...     return sum(leaf.size for leaf in jax.tree.leaves(residuals))
        >>> part = bh.chain(bh.dense(64), bh.checkpoint(bh.chain(bh.gelu(), bh.dense(4))))
        >>> stored(wide), stored(part), stored(bh.checkpoint(wide))
        (792, 408, 24)
    """
    if whole_number("repeat's depth", depth) < 1:
        raise ValueError(f"repeat needs a depth of at least 1, got {depth}")

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        params = jax.vmap(lambda key: inner.init(key, x, **side))(jax.random.split(key, depth))
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        y = output_shape(inner, one, x, **side)
        same_shape(f"repeat: the output of {inner.name}", y, "its input", x)
        return params

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        def step(x: PyTree, own: tuple[Params, Array | None]) -> tuple[PyTree, _Saved]:
            y, residuals = inner.forward(own[0], x, **with_key(side, own[1]))
            same_shape(f"repeat: the output of {inner.name}", y, "its input", x)
            return y, _Saved.of(residuals, x, y)

        y, saved = lax.scan(step, x, (params, keys_of(side, depth)), length=depth)
        leaves, structure = jax.tree.flatten(shapes_of(x))
        return y, (saved, saved.shared(x), Static((tuple(leaves), structure)))

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        collect = getattr(collect, "of", lambda _: collect)(params)
        saved, shared, shapes = residuals
        like = jax.tree.unflatten(shapes.value[1], shapes.value[0])

        def step(dy: PyTree, own: tuple[Params, _Saved, Array | None]) -> tuple[PyTree, PyTree]:
            params, saved, key = own
            residuals = saved.restore(shared)
            collected, dx = inner.backward(params, residuals, dy, collect, **with_key(side, key))
            return _filled(dx, like), collected

        each = (params, saved, keys_of(side, depth))
        first = _filled(dy, like)
        onto = getattr(collect, "onto", {})
        leaves = jax.tree.leaves(params)
        if leaves and all(id(leaf) in onto for leaf in leaves):
            sums = [onto[id(leaf)] for leaf in leaves]
            _, one = jax.eval_shape(step, first, jax.tree.map(lambda leaf: leaf[0], each))
            # Only what is the gradient and nothing else belongs to the sums.
            if [x.shape for x in jax.tree.leaves(one)] == [x.shape[1:] for x in sums]:
                return _added(step, first, each, sums, depth)
        dx, collected = lax.scan(step, first, each, length=depth, reverse=True)
        return collected, dx

    return around("repeat", inner, forward, backward, init)


def _added(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    dy: PyTree,
    each: PyTree,
    sums: list[Array],
    depth: int,
) -> tuple[PyTree, PyTree]:
    """The scan on the way back, each step's gradient added to its place in the sums."""
    structure: list[Any] = []

    def onto(carry: tuple[PyTree, list[Array]], own: tuple[Array, PyTree]) -> Any:
        dy, sums = carry
        index, each = own
        dx, collected = step(dy, each)
        leaves, tree = jax.tree.flatten(collected)
        structure[:] = [tree]
        pairs = zip(sums, leaves, strict=True)
        return (dx, [total.at[index].add(g.astype(total.dtype)) for total, g in pairs]), None

    steps = (jnp.arange(depth), each)
    (dx, sums), _ = lax.scan(onto, (dy, sums), steps, length=depth, reverse=True)
    return structure[0].unflatten([Summed(total) for total in sums]), dx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """The residuals of one step of a scan, each array once.

    `plan` says where each leaf is: in `arrays` at an index, or, as ("x", index), among the leaves
    of x that the step passes on unchanged.
    """

    arrays: list[Leaf]
    plan: tuple[int | tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(residuals: Residuals, x: PyTree, y: PyTree) -> "_Saved":
        """Finds what is shared by identity: the same traced array is the same value."""
        pairs = enumerate(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
        places: dict[int, Any] = {id(into): ("x", i) for i, (into, out) in pairs if into is out}
        leaves, structure = jax.tree.flatten(residuals)
        arrays: list[Array] = []
        for leaf in leaves:
            if id(leaf) not in places:
                places[id(leaf)] = len(arrays)
                arrays.append(leaf)
        return _Saved(arrays, tuple(places[id(leaf)] for leaf in leaves), structure)

    def shared(self, x: PyTree) -> dict[int, Array]:
        """The leaves of x that residuals of every step refer to, by index."""
        leaves = jax.tree.leaves(x)
        return {place[1]: leaves[place[1]] for place in self.plan if isinstance(place, tuple)}

    def restore(self, shared: Mapping[int, Array]) -> Residuals:
        leaves = [
            shared[place[1]] if isinstance(place, tuple) else self.arrays[place]
            for place in self.plan
        ]
        return jax.tree.unflatten(self.structure, leaves)


def _filled(error: PyTree, like: PyTree) -> PyTree:
    """An error with zeros where a floating-point part has none: a scan hands on one structure."""

    def fill(shape: jax.ShapeDtypeStruct, error: Array | None) -> Array | None:
        missing = error is None and jnp.issubdtype(shape.dtype, jnp.floating)
        return jnp.zeros(shape.shape, shape.dtype) if missing else error

    if error is None:
        error = jax.tree.map(lambda _: None, like)
    return jax.tree.map(fill, like, error)
