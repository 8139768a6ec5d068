"""One layer, changed: recomputed, frozen, or with its side inputs renamed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from backhand.combinators.common import around, need_layer
from backhand.protocol import Layer, listed, suggestion
from backhand.visit import Collect, Params, PyTree, Residuals, gradients


def checkpoint(inner: Layer) -> Layer:
    """The same layer, its residuals recomputed from its input on the way back.

    Saves x alone. Where memory is the limit use it inside `repeat`: unrolled on CPU, XLA may merge
    the recomputation with the first one, as it may for `jax.checkpoint`, which is what the
    automatic gradient of this layer goes through. Around a part of a block it recomputes
    that part alone: the example of `repeat` shows what each choice stores.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> layer = checkpoint(bh.chain(bh.dense(64), bh.relu(), bh.dense(4)))
        >>> x = jnp.ones((2, 4))
        >>> _, residuals = layer.forward(layer.init(jax.random.key(0), x), x)
        >>> jax.tree.map(jnp.shape, residuals)
        (2, 4)

    References:
        Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        unchanged: list[int | None] = []

        def run(params: Params, x: PyTree) -> PyTree:
            y = inner(params, x, **side)
            places = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(x))}
            unchanged[:] = [places.get(id(leaf)) for leaf in jax.tree.leaves(y)]
            return y

        structure: Any
        leaves, structure = jax.tree.flatten(jax.checkpoint(run)(params, x))
        inputs = jax.tree.leaves(x)
        # What is passed on unchanged stays the same array, so that `repeat` stores it once.
        same = [leaf if i is None else inputs[i] for leaf, i in zip(leaves, unchanged, strict=True)]
        return structure.unflatten(same), x

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        x, dy = lax.optimization_barrier((residuals, dy))
        _, residuals = inner.forward(params, x, **side)
        return inner.backward(params, residuals, dy, collect, **side)

    return around("checkpoint", inner, forward, backward)


def freeze(inner: Layer) -> Layer:
    """The same layer, learning nothing: gradients of zero, without the work of computing them.

    For fine-tuning: running statistics stand still too, and batch norm normalises by them, in
    training as in evaluation. Other noise stays, dropout's as well: what is frozen is parameters.
    In training its layers get `training="frozen"`, which is true as True is.

    A rule with weight decay still shrinks what has no gradient: `train_step(frozen=...)` keeps the
    optimizer away too. That alone, without `freeze`, leaves batch norm at the batch's statistics.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> layer = freeze(bh.batch_norm(eps=0.0))
        >>> x = jnp.array([[4.0], [6.0]])
        >>> params = layer.init(jax.random.key(0), x)  # a running mean of 0, a variance of 1
        >>> layer(params, x, training=True).tolist()
        [[4.0], [6.0]]
    """

    def held(side: Mapping[str, Any]) -> dict[str, Any]:
        return {**side, "training": "frozen"} if side.get("training") else dict(side)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        return inner.forward(lax.stop_gradient(params), x, **held(side))

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        fixed = lax.stop_gradient(params)
        return inner.backward(fixed, residuals, dy, lambda v: collect(v.frozen()), **held(side))

    return around("freeze", inner, forward, backward)


def rename(inner: Layer, **names: str) -> Layer:
    """The same layer, its side inputs known by other names outside.

    Raises:
        ValueError: if `inner` has no such side input, or for `key`, which is always a key.

    Example:
        >>> import backhand as bh
        >>> def attend(params, x, *, mask): ...
        >>> inner = bh.layer("attend", lambda key, x: (), attend, attend)
        >>> sorted(bh.rename(inner, mask="source_mask").uses)
        ['source_mask']
    """
    need_layer("rename", inner)
    for name in names:
        if name not in inner.uses or name == "key":
            raise ValueError(
                f"rename: {inner.name} has no side input {name!r} to rename; it uses "
                f"{listed(inner.uses - {'key'})}{suggestion(name, inner.uses)}"
            )
    outside = {use: names.get(use, use) for use in inner.uses}
    if len(set(outside.values())) < len(outside):
        raise ValueError(
            f"rename: two side inputs of {inner.name} would have one name: {listed(names.values())}"
        )

    def inside(side: Mapping[str, Any]) -> dict[str, Any]:
        return {use: side[name] for use, name in outside.items() if name in side}

    return dataclasses.replace(
        inner,
        init=lambda key, x, **side: inner.init(key, x, **inside(side)),
        forward=lambda params, x, **side: inner.forward(params, x, **inside(side)),
        backward=lambda params, residuals, dy, collect=gradients, **side: inner.backward(
            params, residuals, dy, collect, **inside(side)
        ),
        uses=frozenset(outside.values()),
    )
