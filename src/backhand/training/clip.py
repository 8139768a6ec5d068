"""The gradient of a batch clipped to a norm: whole, or layer by layer."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from backhand.arrays import upcast
from backhand.gradients import Batch, Objective, value_and_collect
from backhand.visit import Collector, Params, PyTree, Visit


def by_norm(grads: PyTree, max_norm: float) -> PyTree:
    """The gradient g scaled by min(1, c / |g|).

    Args:
        grads: g, a tree of arrays.
        max_norm: c.
    """
    return scaled(grads, max_norm / jnp.maximum(norm(grads), max_norm))


def norm(grads: PyTree) -> Array:
    """The norm of all leaves together; in float32 of lower ones, whose squares overflow."""
    wide: Array = optax.tree.norm(jax.tree.map(upcast, grads))
    return wide


def by_layer(grads: PyTree, layers: PyTree, max_norm: float) -> PyTree:
    """Each layer's gradient scaled by min(1, c / |g|), with |g| the norm of its own.

    Args:
        grads: a tree of gradients.
        layers: what `layers_of` gives: one leaf for each layer, of the shape of its depth.
        max_norm: c.
    """

    def clip(depth: jax.ShapeDtypeStruct, own: PyTree) -> PyTree:
        def per_layer(g: Array) -> Array:
            return jnp.sum(jnp.square(upcast(g)), range(len(depth.shape), g.ndim))

        squares = [per_layer(g) for g in jax.tree.leaves(own)]
        if not squares:
            return own
        norms = jnp.sqrt(sum(squares[1:], start=squares[0]))
        return scaled(own, max_norm / jnp.maximum(norms, max_norm))

    return jax.tree.map(clip, layers, grads)


def layers_of(objective: Objective, params: Params, batch: Batch, key: Array | None) -> PyTree:
    """The layers that own parameters: a leaf for each, in the tree that theirs are subtrees of.

    A layer is what `bh.layer` makes, so all four maps of an attention are one, and so is a
    parameter by itself. A repeated layer's leaf has the shape of its depth, and a parameter used
    more than once belongs to the layer that it is stored with. Nothing runs.
    """
    visited = Collector(_one, degree=0)
    reverse = value_and_collect(objective, layers=visited).evaluate
    return jax.eval_shape(lambda: reverse(params, batch, key=key)[1]["layers"])


def _one(visit: Visit) -> Array:
    """A scalar for a layer; scans stack it, as they do its parameters."""
    return jnp.zeros(())


def scaled(grads: PyTree, factors: Array) -> PyTree:
    """The gradients times their factors, of the shape of their leading axes."""

    def times(g: Array) -> Array:
        wide, rest = upcast(g), (1,) * (g.ndim - factors.ndim)
        return (wide * factors.astype(wide.dtype).reshape(*factors.shape, *rest)).astype(g.dtype)

    return jax.tree.map(times, grads)
