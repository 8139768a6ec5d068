"""How far output and gradients are from float64's: in their largest element, and altogether.

One rounding more in the largest of many elements is luck, the root mean square of all of them is
not: both are measured, over draws whose numbers differ.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DRAWS = (1.0, 0.97, 0.91, 0.83)
"""The arguments of a case times each of these: they round elsewhere."""


def both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    """`(dy, *arguments) -> (y, cotangents of what is floating point)`."""

    def run(dy: Any, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        where = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

        def of_floating(*given: Any) -> Any:
            known = dict(zip(where, given, strict=True))
            own = [known.get(i, leaf) for i, leaf in enumerate(leaves)]
            return function(*structure.unflatten(own))

        y, pull = jax.vjp(of_floating, *(leaves[i] for i in where))
        return y, pull(dy)

    return run


def is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def draw(function: Callable[..., Any], arguments: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """The arguments of `both_ways(function)`, other ones for each index into `DRAWS`.

    The error of the output is normal; what is floating point in the arguments is scaled.
    """
    rng = np.random.default_rng(7 + index)
    dy = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
        jax.eval_shape(function, *arguments),
    )

    def scaled(leaf: Any) -> Any:
        return leaf * np.asarray(DRAWS[index], leaf.dtype) if is_floating(leaf) else leaf

    return dy, *jax.tree.map(scaled, arguments)


def relative_errors(ours: Any, truth: Any) -> tuple[float, float]:
    """Of the worst leaf: the largest difference over the largest element, and the root mean
    square of all differences over that of all elements."""
    largest = mean = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        exact = np.asarray(b, np.float64)
        difference = np.abs(np.asarray(a, np.float64) - exact)
        scale = np.abs(exact).max(initial=0) or 1.0
        largest = max(largest, float(difference.max(initial=0) / scale))
        size = np.linalg.norm(exact) or 1.0
        mean = max(mean, float(np.linalg.norm(difference) / size))
    return largest, mean


def errors(
    programs: Sequence[Callable[..., Any]], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> list[tuple[float, float]]:
    """The largest and the root mean square error of each program, means over the draws.

    Args:
        programs: `both_ways` of functions, in the dtype of the arguments.
        function: what is right, in float64.
        arguments: of `function`.
    """
    wide, found = jax.jit(both_ways(function)), []
    for index in range(len(DRAWS)):
        given = draw(function, arguments, index)
        truth = in_float64(wide, given)
        found.append([relative_errors(program(*given), truth) for program in programs])
    return [(float(largest), float(mean)) for largest, mean in np.mean(found, axis=0)]


def in_float64(program: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a program gives for the same numbers in float64."""

    def wide(leaf: Any) -> Any:
        return np.asarray(leaf).astype(np.float64) if is_floating(leaf) else leaf

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, program(*jax.tree.map(wide, arguments)))
