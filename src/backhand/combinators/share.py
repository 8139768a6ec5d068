"""Parameters used more than once: tied tables, a block at several places."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from backhand.combinators.common import around, same_shape
from backhand.contributions import Leaf, both, is_contribution
from backhand.protocol import Layer
from backhand.visit import Collect, Params, PyTree, Residuals, Visit, gradients

Path: TypeAlias = tuple[str, ...]


def share(inner: Layer, ties: Mapping[str, str]) -> Layer:
    """The same layer, some of its parameters being others: tied tables, blocks used twice.

    `ties` maps the path of a parameter, or of a whole subtree, to the path of the one to use in its
    place; a path is its keys joined by "/". The tied ones are gone from the parameters (a place in
    a tuple keeps an empty one).

    A parameter used more than once gets the sum of its uses' gradients. What a collector gathers
    there comes from one last visit, without dx, with the contributions of all uses as `Many`,
    because the norm of a sum is not the sum of the norms.

    Raises:
        ValueError: at init, for a path that does not exist, or a tie to another shape.

    Example:
        >>> import backhand as bh
        >>> block = bh.chain(bh.dense(8), bh.tanh())
        >>> twice = share(bh.chain(first=block, second=block), {"second": "first"})
        >>> x = jax.ShapeDtypeStruct((4, 8), "float32")
        >>> list(twice.init(jax.random.key(0), x))
        ['first']
    """
    pairs = [tuple(tuple(path.split("/")) for path in tie) for tie in ties.items()]

    def whole(params: Params) -> Params:
        for target, source in pairs:
            params = _replace(params, target, _get(params, source))
        return params

    def without(tree: PyTree) -> PyTree:
        for target, _ in reversed(pairs):
            tree = _replace(tree, target, _ABSENT)
        return tree

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        full = inner.init(key, x, **side)
        params = without(full)
        for (target, source), name in zip(pairs, ties, strict=True):
            same_shape(f"share: {name!r}", _get(full, target), repr(ties[name]), _get(full, source))
        same_shape("share: the parameters with ties", whole(params), "those without", full)
        return params

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        return inner.forward(whole(params), x, **side)

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        full = whole(params)
        tied = [_get(full, path) for pair in pairs for path in pair]
        use = _Uses(collect, frozenset(id(leaf) for leaf in jax.tree.leaves(tied)))
        uses, dx = inner.backward(full, residuals, dy, use, **side)
        for target, source in reversed(pairs):
            moved = _contributions(uses, target)
            uses = _add(_remove(uses, target), source, moved)
        collected = jax.tree.map(
            lambda use: use.collect(collect) if _is_use(use) else use, uses, is_leaf=_is_use
        )
        return collected, dx

    return around("share", inner, forward, backward, init)


@dataclasses.dataclass(frozen=True)
class _Uses:
    """A collector that keeps its visits, until all uses of the tied parameters are known."""

    collect: Collect
    tied: frozenset[int]

    @property
    def onto(self) -> Mapping[int, Array]:
        return getattr(self.collect, "onto", {})

    def of(self, params: Params) -> Collect:
        """What collects from a layer with these parameters: no visit is kept of one without ties.

        For a scan over depth, whose visits do not have the parameters themselves.
        """
        if any(id(leaf) in self.tied for leaf in jax.tree.leaves(params)):
            return self
        return self.collect

    def __call__(self, visit: Visit) -> tuple["_Use", PyTree]:
        collected, dx = self.collect(visit)
        parts = (visit.params, visit.residuals, visit.dy, visit.contributions)
        return _Use(collected, jnp.zeros(()), *parts), dx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Use:
    """One visit as a tree of arrays, so that it comes out of a scan.

    What is not needed of it is dead code to the compiler.
    `depth` is a scalar where the visit was made: its rank tells how many scans stacked it since.
    `tied` says that its contributions are no longer those that `collected` was read from.
    """

    collected: PyTree
    depth: Leaf
    params: Params
    residuals: Residuals
    dy: PyTree
    contributions: PyTree
    tied: bool = dataclasses.field(default=False, metadata={"static": True})

    def collect(self, collect: Collect) -> PyTree:
        if not self.tied:
            return self.collected
        if not jax.tree.leaves(self.params):
            return self.params

        def read(params: Params, residuals: Residuals, dy: PyTree, contributions: PyTree) -> PyTree:
            return collect(Visit(params, residuals, dy, None).replace(params, contributions))[0]

        for _ in range(self.depth.ndim):
            read = jax.vmap(read)
        return read(self.params, self.residuals, self.dy, self.contributions)


def _is_use(node: Any) -> bool:
    return isinstance(node, _Use)


def _contributions(uses: PyTree, path: Path) -> PyTree:
    """The contributions of the parameter, or the subtree of them, at `path`."""
    if isinstance(uses, _Use):
        return _get(uses.contributions, path)
    if not path:
        return jax.tree.map(lambda use: use.contributions, uses, is_leaf=_is_use)
    return _contributions(_get(uses, path[:1]), path[1:])


def _add(uses: PyTree, path: Path, moved: PyTree) -> PyTree:
    """Adds the contributions `moved` to those at `path`."""
    if isinstance(uses, _Use):
        own = _get(uses.contributions, path)
        together = jax.tree.map(both, own, moved, is_leaf=is_contribution)
        contributions = _replace(uses.contributions, path, together)
        return dataclasses.replace(uses, contributions=contributions, tied=True)
    if not path:
        return jax.tree.map(lambda use, c: _add(use, (), c), uses, moved, is_leaf=_is_use)
    return _replace(uses, path[:1], _add(_get(uses, path[:1]), path[1:], moved))


def _remove(uses: PyTree, path: Path) -> PyTree:
    """Takes the parameter, or the subtree, at `path` away from its owner."""
    if isinstance(uses, _Use):
        params, contributions = (
            _replace(tree, path, _ABSENT) for tree in (uses.params, uses.contributions)
        )
        return dataclasses.replace(uses, params=params, contributions=contributions, tied=True)
    if len(path) == 1:
        return _replace(uses, path, _ABSENT)
    return _replace(uses, path[:1], _remove(_get(uses, path[:1]), path[1:]))


_ABSENT = object()


def _get(tree: PyTree, path: Path) -> PyTree:
    """The subtree at a path.

    Raises:
        ValueError: if there is none.
    """
    for key in path:
        place = int(key) if isinstance(tree, tuple | list) and key.isdigit() else key
        try:
            tree = tree[place]
        except (KeyError, IndexError, TypeError):
            known = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            raise ValueError(
                f"share: no parameter at {'/'.join(path)!r}: {key!r} is not among {known}"
            ) from None
    return tree


def _replace(tree: PyTree, path: Path, value: Any) -> PyTree:
    """The tree with another subtree at a path; `_ABSENT` takes it away."""
    if not path:
        return value
    key = path[0]
    if isinstance(tree, dict):
        if len(path) > 1:
            return {**tree, key: _replace(_get(tree, (key,)), path[1:], value)}
        rest = {name: child for name, child in tree.items() if name != key}
        return rest if value is _ABSENT else {**rest, key: value}
    children = list(tree)
    child = _replace(_get(tree, (key,)), path[1:], value)
    children[int(key)] = () if child is _ABSENT else child
    return type(tree)(children)
