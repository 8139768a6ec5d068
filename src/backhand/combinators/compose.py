"""Layers one after another and side by side: chain, parallel, add, skip."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import is_floating, like_primal
from backhand.combinators.common import (
    add_errors,
    around,
    check_params,
    located,
    pack,
    part_of,
    parts_of,
    same_shape,
    side_of,
    uses_of,
    with_part,
)
from backhand.protocol import Layer, Static, listed, output_shape
from backhand.visit import Collect, Params, PyTree, Residuals, gradients


def chain(*layers: Layer, **named: Layer) -> Layer:
    """Layers one after another: y = f_n(... f_2(f_1(x))).

    Backward in reverse: the error that a layer hands back is the error of its predecessor's output.
    Parameters are a tuple for positional layers, a dict for named ones.

    Raises:
        ValueError: if there is no layer, or some are named and some are not.

    Example:
        >>> import backhand as bh
        >>> chain(hidden=bh.dense(128), act=bh.relu(), out=bh.dense(10))
        chain(hidden=dense, act=relu, out=dense)
    """
    parts = parts_of("chain", layers, named)

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        params = {}
        for index, (name, part) in enumerate(parts.items()):
            with located("chain", name):
                own = side_of(part, side, index)
                params[name] = part.init(jax.random.fold_in(key, index), x, **own)
                x = output_shape(part, params[name], x, **own)
        return pack(parts, params)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        check_params("chain", parts, params)
        residuals = {}
        for index, (name, part) in enumerate(parts.items()):
            with located("chain", name):
                x, residuals[name] = part.forward(params[name], x, **side_of(part, side, index))
        return x, pack(parts, residuals)

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        collected = {}
        for index, (name, part) in reversed(list(enumerate(parts.items()))):
            with located("chain", name):
                collected[name], dy = part.backward(
                    params[name], residuals[name], dy, collect, **side_of(part, side, index)
                )
        return pack(parts, collected), dy

    return Layer("chain", init, forward, backward, uses_of(parts), parts)


def parallel(*layers: Layer, **named: Layer) -> Layer:
    """Layers side by side on one input: y = (f_1(x), f_2(x), ...), a dict for named layers.

    Backward: dx is the sum of the branches' errors. Every branch gets the whole of x: a layer on
    one part of it is `on`.

    Raises:
        ValueError: if there is no layer, or some are named and some are not.

    Example:
        >>> import backhand as bh
        >>> layer = parallel(wide=bh.relu(), narrow=bh.tanh())
        >>> y = layer({"wide": (), "narrow": ()}, jnp.array([-1.0, 2.0]))
        >>> y["wide"].tolist()
        [0.0, 2.0]
    """
    parts = parts_of("parallel", layers, named)

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        params = {}
        for index, (name, part) in enumerate(parts.items()):
            with located("parallel", name):
                own = side_of(part, side, index)
                params[name] = part.init(jax.random.fold_in(key, index), x, **own)
        return pack(parts, params)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        check_params("parallel", parts, params)
        ys, residuals = {}, {}
        for index, (name, part) in enumerate(parts.items()):
            with located("parallel", name):
                ys[name], residuals[name] = part.forward(
                    params[name], x, **side_of(part, side, index)
                )
        return pack(parts, ys), pack(parts, residuals)

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        collected, dx = {}, None
        for index, (name, part) in reversed(list(enumerate(parts.items()))):
            own = None if dy is None else dy[name]
            with located("parallel", name):
                collected[name], branch = part.backward(
                    params[name], residuals[name], own, collect, **side_of(part, side, index)
                )
            dx = add_errors(dx, branch)
        return pack(parts, collected), dx

    return Layer("parallel", init, forward, backward, uses_of(parts), parts)


def add(*layers: Layer, **named: Layer) -> Layer:
    """The sum of branches on one input: y = f_1(x) + f_2(x) + ...

    Backward: each branch gets the whole error dy, and dx is the sum of theirs.

    Raises:
        ValueError: if there is no layer, some are named and some are not, or the branches' outputs
            differ in shape or dtype.

    Example:
        >>> import backhand as bh
        >>> add(bh.relu(), bh.relu())(((), ()), jnp.array([-1.0, 2.0])).tolist()
        [0.0, 4.0]
    """
    branches = parallel(*layers, **named)
    names = list(branches.parts)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        ys, residuals = branches.forward(params, x, **side)
        y = ys[names[0]]
        for name in names[1:]:
            same_shape(f"add: branch {name!r}", ys[name], f"branch {names[0]!r}", y)
            y = jax.tree.map(jnp.add, y, ys[name])
        return y, residuals

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        shared = pack(branches.parts, dict.fromkeys(names, dy))
        return branches.backward(params, residuals, shared, collect, **side)

    return Layer("add", branches.init, forward, backward, branches.uses, branches.parts)


def skip(inner: Layer, on: str | int | None = None) -> Layer:
    """A skip connection: y = x + f(x), where x is floating point; other parts of x are f's.

    Backward: dx = dy + (the error through f), so blame reaches early layers undiminished. Its
    parameters are those of `inner`. What f gives beside y, of an array x, is given beside the sum.

    Args:
        inner: f.
        on: the part of a dict or a tuple x that f's output is added to, where f reads them all and
            gives one: {**x, on: x[on] + f(x)}. The others are passed on.

    Raises:
        ValueError: if f changes the shape or dtype of its input.

    Example:
        >>> import backhand as bh
        >>> attend = skip(bh.multi_head_attention(2), on="x")
        >>> x = {"x": jnp.ones((2, 3, 4)), "context": jnp.ones((2, 7, 6))}
        >>> jax.tree.map(jnp.shape, attend(attend.init(jax.random.key(0), x), x))
        {'context': (2, 7, 6), 'x': (2, 3, 4)}

    References:
        He et al., "Deep residual learning for image recognition", 2015.
    """

    def own(x: PyTree) -> PyTree:
        return x if on is None else part_of("skip", x, on)

    def check(x: PyTree, y: PyTree) -> None:
        if on is None and isinstance(x, dict | tuple) and isinstance(y, Array):
            parts = f"dict of {listed(x)}" if isinstance(x, dict) else f"tuple of {len(x)}"
            raise ValueError(
                f"skip: x is a {parts} and the inner layer gives one array: say which part it is "
                "added to, as in skip(inner, on='x') or on=0"
            )
        its = "its input" if on is None else f"the part {on!r} of its input"
        same_shape("skip: the output of the inner layer", y, its, own(x))

    def init(key: Array, x: PyTree, **side: Any) -> Params:
        own(x)
        return inner.init(key, x, **side)

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        y, residuals = inner.forward(params, x, **side)
        beside = isinstance(y, tuple) and not isinstance(own(x), tuple)
        y, *more = y if beside else (y,)
        check(x, y)
        y = jax.tree.map(lambda x, y: x + y if is_floating(x) else y, own(x), y)
        y = y if on is None else with_part(x, on, y)
        return (y, *more) if beside else y, (residuals, Static(beside))

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        residuals, beside = residuals[0], residuals[1].value
        dy, *more = dy if beside and dy is not None else (dy,)
        error = dy if on is None or dy is None else dy[on]
        error = (error, *more) if beside and dy is not None else error
        collected, dx = inner.backward(params, residuals, error, collect, **side)
        return collected, _direct(dy, dx)

    return around("skip", inner, forward, backward, init)


def _direct(dy: PyTree, dx: PyTree) -> PyTree:
    """The error of x, and that of the output, which reaches it directly."""
    if dy is None or dx is None:
        return add_errors(dy, dx)
    if isinstance(dx, Array):
        return add_errors(like_primal(dy, dx), dx)
    return jax.tree.map(_direct, dy, dx, is_leaf=lambda leaf: leaf is None)
