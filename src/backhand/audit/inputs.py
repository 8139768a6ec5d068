"""Bad input, each in one sentence, before anything compiles; the original error stays behind it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from backhand.visit import PyTree

Result = TypeVar("Result")

LONGEST = 240


class SideEffectError(TypeError):
    """A function used what an earlier call of it left behind."""


def is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an array; anything else is a setting, held fixed."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def check_arguments(name: str, arguments: Sequence[PyTree], names: Sequence[str]) -> None:
    """Refuses arguments that cannot be differentiated as they are.

    Raises:
        TypeError: for numbers in a list, for complex numbers.
    """
    for argument, own in zip(arguments, names, strict=True):
        _check_lists(name, own, argument)
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
            inside = jax.tree_util.keystr(path, simple=True, separator="/")
            place = "/".join(part for part in (own, inside) if part)
            if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(
                    f"{name}: {place} is {leaf.dtype}, and gradients of complex numbers are not "
                    "audited; give its real and imaginary parts as two arrays"
                )


def _check_lists(name: str, own: str, tree: PyTree) -> None:
    if isinstance(tree, list) and any(isinstance(x, int | float | complex) for x in _flat(tree)):
        raise TypeError(
            f"{name}: {own or 'an argument'} is a Python list of numbers; give an array, "
            "jnp.asarray(...)"
        )
    if isinstance(tree, list | tuple):
        for item in tree:
            _check_lists(name, own, item)
    elif isinstance(tree, dict):
        for key, item in tree.items():
            _check_lists(name, f"{own}/{key}".lstrip("/"), item)


def _flat(value: Any) -> list[Any]:
    """The elements of nested lists."""
    return [x for item in value for x in _flat(item)] if isinstance(value, list) else [value]


def first_sentence(error: BaseException) -> str:
    """What an error says, in one line, without the trace and the advice after it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text.split(". ")[0].rstrip(".:")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def counted(count: int, what: str) -> str:
    """A number of things: 1 argument, 2 arguments."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def readable(value: Any) -> str:
    """A short description of a value that is of the wrong kind."""
    if is_array(value):
        return f"an array {value.shape}"
    if any(is_array(leaf) for leaf in jax.tree.leaves(value)):
        return f"a {type(value).__name__} of arrays"
    return f"{type(value).__name__} {value!r}"[:80]


def shapes(what: str, function: Callable[..., Result], *args: Any) -> Result:
    """The shapes of what a function gives, or one sentence on why it does not run.

    Raises:
        TypeError: with the original error as its cause.
    """
    try:
        with no_side_effects(what):
            return jax.eval_shape(function, *args)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            f"{what} cannot be traced: it needs the number itself, as `if`, `float` and NumPy do; "
            "use jnp.where or lax.cond, or give what decides as a plain Python value"
        ) from error
    except SideEffectError:
        raise
    except Exception as error:
        text = str(error)
        if "do not support JVP" in text or "not implemented" in text or "differentia" in text:
            raise TypeError(
                f"{what} is not differentiable: {first_sentence(error)}; give it a rule with "
                "jax.custom_vjp"
            ) from error
        raise TypeError(f"{what} does not run: {first_sentence(error)}") from error


@contextlib.contextmanager
def no_side_effects(what: str) -> Iterator[None]:
    """Says in one sentence that a function uses what an earlier call left behind.

    Raises:
        SideEffectError: with the original error as its cause.
    """
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise SideEffectError(
            f"{what} has a side effect: it uses a traced value of an earlier call; return the "
            "value instead, and give it as an argument where it is needed again"
        ) from error


def check_leaks(what: str, function: Callable[..., Any], *args: Any) -> None:
    """Refuses a function that keeps a traced value: under jit it is a value of no use.

    Raises:
        SideEffectError: with JAX's account of what leaked as its cause.
    """
    try:
        with jax.checking_leaks():
            jax.eval_shape(fresh(function), *args)
    except Exception as error:
        if "Leaked" in str(error):
            raise SideEffectError(
                f"{what} has a side effect: it keeps a traced value outside of the function; "
                "return the value instead, and give it as an argument where it is needed again"
            ) from error


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that JAX has not traced before."""
    return lambda *args: function(*args)


def check_outputs(name: str, y: PyTree) -> None:
    """Refuses outputs that have no error to pull back.

    Raises:
        TypeError: for complex outputs, for none of floating point.
    """
    leaves = jax.tree.leaves(y)
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"{name} gives {leaf.dtype}, and gradients of complex outputs are not audited; "
                "return its real and imaginary parts as two arrays"
            )
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves})) or "nothing"
        raise TypeError(f"{name} is not differentiable: its output is {kinds}, not floating point")


def check_same_outputs(name: str, ours: PyTree, reference: PyTree) -> None:
    """Refuses two functions whose outputs cannot be set side by side.

    Raises:
        ValueError: saying how their trees or shapes differ.
    """
    sides = [jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, reference)]
    described = [
        {jax.tree_util.keystr(path) or "the output": leaf.shape for path, leaf in side}
        for side in sides
    ]
    if described[0] != described[1]:
        first, second = (
            ", ".join(f"{path}: {shape}" for path, shape in side.items()) or "nothing"
            for side in described
        )
        raise ValueError(
            f"{name}: both sides must give outputs of the same tree and shapes, got {first} "
            f"beside {second}"
        )
