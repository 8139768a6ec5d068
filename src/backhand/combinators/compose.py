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
    parts_of,
    same_shape,
    side_of,
    uses_of,
)
from backhand.protocol import Layer, output_shape
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

    Backward: dx is the sum of the branches' errors.

    Raises:
        ValueError: if there is no layer, or some are named and some are not.
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
            with located("parallel", name):
                collected[name], branch = part.backward(
                    params[name], residuals[name], dy[name], collect, **side_of(part, side, index)
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


def skip(inner: Layer) -> Layer:
    """A skip connection: y = x + f(x), where x is floating point; other parts of x are f's.

    Backward: dx = dy + (the error through f), so blame reaches early layers undiminished. Its
    parameters are those of `inner`.

    Raises:
        ValueError: if f changes the shape or dtype of its input.

    References:
        He et al., "Deep residual learning for image recognition", 2015.
    """

    def forward(params: Params, x: PyTree, **side: Any) -> tuple[PyTree, Residuals]:
        y, residuals = inner.forward(params, x, **side)
        same_shape("skip: the output of the inner layer", y, "its input", x)
        added = jax.tree.map(lambda x, y: x + y if is_floating(x) else y, x, y)
        return added, residuals

    def backward(
        params: Params, residuals: Residuals, dy: PyTree, collect: Collect = gradients, **side: Any
    ) -> tuple[PyTree, PyTree]:
        collected, dx = inner.backward(params, residuals, dy, collect, **side)
        direct = jax.tree.map(lambda dy, dx: dy if dx is None else like_primal(dy, dx), dy, dx)
        return collected, add_errors(direct, dx)

    return around("skip", inner, forward, backward)
