"""An exercise as data: a forward pass, what is asked, hints, and the answer."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backhand.arrays import is_floating
from backhand.catalogue import Spec, make

CALLS = 3
"""How many random errors of the output a backward is tried with."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One backward pass to write.

    Attributes:
        name: what it is asked for by.
        difficulty: from 1 to 5.
        forward: `(*arguments) -> (y, residuals)`, textbook code that `jax.grad` differentiates.
        backward: the answer, `(residuals, dy)` -> one cotangent per argument.
        inputs: what the arguments are, by name.
        question: the mathematics to derive, in words.
        hints: from a nudge to nearly the answer.
    """

    name: str
    difficulty: int
    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., Any]
    inputs: Mapping[str, Spec]
    question: str
    hints: tuple[str, ...]

    @property
    def template(self) -> str:
        """The backward pass, to be filled in."""
        results = ", ".join(
            "None" if spec.kind == "ids" else f"d{name}" for name, spec in self.inputs.items()
        )
        return f"def backward(residuals, dy):\n    ...\n    return {results}"

    @functools.cached_property
    def problem(self) -> "Problem":
        """The task in float64, with what `jax.grad` makes of the forward.

        Compiled as one program, and once: a learner tries many times.
        """
        arguments = tuple(make(tuple(self.inputs.values()), jnp.float64))
        floating = {i: leaf for i, leaf in enumerate(arguments) if is_floating(leaf)}
        shape = jax.eval_shape(self.forward, *arguments)[0].shape
        errors = jnp.asarray(np.random.default_rng(1).normal(size=(CALLS, *shape)))

        @jax.jit
        def run(arguments: tuple[Array, ...], errors: Array) -> tuple[Any, list[Array]]:
            def output(leaves: list[Array]) -> Array:
                given = dict(enumerate(arguments)) | dict(zip(floating, leaves, strict=True))
                return self.forward(*given.values())[0]

            vjp = jax.vjp(output, [arguments[i] for i in floating])[1]
            return self.forward(*arguments)[1], jax.vmap(lambda dy: vjp(dy)[0])(errors)

        residuals, truth = run(arguments, errors)
        leaves = [np.asarray(leaf) for leaf in truth]
        return Problem(
            arguments, residuals, tuple(errors), dict(zip(floating, leaves, strict=True))
        )


def source(function: Callable[..., Any]) -> str:
    """A function as it is written."""
    return inspect.getsource(function).strip()


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Numbers to try a backward with.

    Attributes:
        arguments: of the forward.
        residuals: that the forward saved.
        errors: of the output, one for each call of the backward.
        truth: by the place of the argument, its cotangents (CALLS, *shape).
    """

    arguments: tuple[Array, ...]
    residuals: Any
    errors: tuple[Array, ...]
    truth: Mapping[int, np.ndarray]
