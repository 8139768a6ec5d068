"""Bad input, each in one sentence, before anything compiles; the original error stays behind it."""

import contextlib
import dis
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from backhand.visit import PyTree

Result = TypeVar("Result")

LONGEST = 240

LIBRARIES = frozenset({"backhand", "beartype", "jax", "jaxlib", "jaxtyping", "numpy"})
"""Whose lines say nothing of a mistake in the code that is audited."""

RAISE = dis.opmap["RAISE_VARARGS"]


class RefusedError(TypeError):
    """What is wrong with a function, in words that need none before them."""


class SideEffectError(RefusedError):
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


def raised_at(error: BaseException) -> str:
    """Where in the user's own code an error was raised; "" if it was not."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in LIBRARIES and not code.co_filename.startswith("<"):
            found = f" (in {code.co_name}, line {line} of {Path(code.co_filename).name})"
    return found


def readable(value: Any) -> str:
    """A short description of a value that is of the wrong kind."""
    if is_array(value):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, ModuleType):
        return f"the module {value.__name__}"
    if value is None:
        return "None"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if any(is_array(leaf) for leaf in jax.tree.leaves(value)):
        return f"a {type(value).__name__} of arrays"
    return f"{type(value).__name__} {value!r}"[:80]


def check_takes(function: Callable[..., Any], count: int, what: str) -> None:
    """Refuses a rule that is not called as JAX calls it.

    Raises:
        TypeError: if it does not take so many arguments; `what` says which.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None


def arrays_alone(what: str, y: PyTree) -> PyTree:
    """An output, refused if it holds what is no array.

    Raises:
        RefusedError: naming the first leaf that is none.
    """
    entries: list[tuple[Any, Any]] = [((), y)]
    if inspect.iscoroutine(y) or inspect.isgenerator(y):
        y.close()
    else:
        entries = jax.tree_util.tree_leaves_with_path(y)
    for path, leaf in entries:
        if not is_array(leaf) and not isinstance(leaf, bool | int | float | complex):
            place = jax.tree_util.keystr(path)
            raise RefusedError(
                f"{what} returns a value of type {type(leaf).__name__}"
                f"{f' at {place}' if place else ''}; it must return arrays, or a tree of arrays"
            )
    return y


def shapes(what: str, function: Callable[..., Result], *args: Any, given: str = "") -> Result:
    """The shapes of what a function gives, or one sentence on why it does not run.

    Args:
        what: it is called.
        function: of `args`.
        args: arrays, or their shapes.
        given: odd arguments in words, for an error that is raised in no line of the user's.

    Raises:
        TypeError: with the original error as its context.
    """
    try:
        with no_side_effects(what):
            return jax.eval_shape(function, *args)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            f"{what} cannot be traced: it needs the number itself, as `if`, `float` and NumPy do"
            f"{raised_at(error)}; use jnp.where, lax.cond or jnp's functions, or give what decides "
            "as a plain Python value"
        ) from None
    except jax.errors.NonConcreteBooleanIndexError as error:
        raise TypeError(
            f"{what} cannot be traced: how many elements a boolean index takes is not known before "
            f"it runs{raised_at(error)}; use jnp.where(mask, x, 0)"
        ) from None
    except RefusedError:
        raise
    except Exception as error:
        text = str(error)
        if text.startswith("IO callbacks"):
            raise SideEffectError(
                f"{what} has a side effect, io_callback{raised_at(error)}: return what it sends, "
                "or look at it with jax.debug.callback"
            ) from None
        if "do not support JVP" in text or "not implemented" in text or "differentia" in text:
            raise TypeError(
                f"{what} is not differentiable: {first_sentence(error)}; give it a rule with "
                "jax.custom_vjp"
            ) from None
        if text.startswith("Custom VJP bwd rule"):
            raise TypeError(
                f"{what} has a backward rule that does not give one cotangent for each argument, "
                "of its tree, shape and dtype; bh.check names which is not"
            ) from None
        place = raised_at(error) or (given and f"; it is given {given}")
        raise TypeError(f"{what} does not run: {first_sentence(error)}{place}") from None


def output_shapes(
    what: str, function: Callable[..., PyTree], *args: Any, given: str = ""
) -> PyTree:
    """The shapes of a function's output, which must hold arrays alone; see `shapes`."""
    return shapes(what, lambda *args: arrays_alone(what, function(*args)), *args, given=given)


@contextlib.contextmanager
def no_side_effects(what: str) -> Iterator[None]:
    """Says in one sentence that a function uses what an earlier call left behind.

    Raises:
        SideEffectError: with the original error as its context.
    """
    try:
        yield
    except jax.errors.UnexpectedTracerError:
        raise SideEffectError(
            f"{what} has a side effect: it uses a traced value of an earlier call; return the "
            "value instead, and give it as an argument where it is needed again"
        ) from None


@contextlib.contextmanager
def no_failing_callbacks(what: str) -> Iterator[None]:
    """Says in one sentence that what a function calls on the host fails.

    Raises:
        TypeError: with the original error as its context.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "callback" not in str(error).lower():
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TypeError(
            f"{what} calls a function on the host that fails: {lines[-1][:LONGEST]}; it must give "
            "the shape and dtype that it promises, those of its argument, in float64 too"
        ) from None


def is_refusal(error: Exception) -> bool:
    """Whether code refuses what it got: a ValueError by its own `raise`.

    NumPy's and JAX's, and Python's of an empty sequence, are of something that went wrong inside.

    Example:
        >>> def refuse():
        ...     raise ValueError("give one example at least")
        >>> found = []
        >>> for function in (refuse, lambda: max([]), lambda: jnp.stack([])):
        ...     try:
        ...         function()
        ...     except ValueError as error:
        ...         found.append(is_refusal(error))
        >>> found
        [True, False, False]
    """
    trace = error.__traceback__
    if trace is None or not isinstance(error, ValueError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    library = str(frame.f_globals.get("__name__", "")).split(".")[0]
    raised = frame.f_code.co_code[trace.tb_lasti] == RAISE
    return raised and library not in LIBRARIES - {"backhand"}


def check_leaks(what: str, function: Callable[..., Any], *args: Any) -> None:
    """Refuses a function that keeps a traced value: under jit it is a value of no use.

    Raises:
        SideEffectError: with JAX's account of what leaked as its context.
    """
    try:
        with jax.checking_leaks():
            jax.eval_shape(fresh(function), *args)
    except Exception as error:
        if "Leaked" in str(error):
            raise SideEffectError(
                f"{what} has a side effect: it keeps a traced value outside of the function; "
                "return the value instead, and give it as an argument where it is needed again"
            ) from None


def check_pure(what: str, function: Callable[..., Any], *args: Any) -> None:
    """Refuses a function whose two calls differ, or that keeps a traced value; see `check_leaks`.

    Raises:
        SideEffectError: saying which.
    """
    check_leaks(what, function, *args)
    if message := two_calls(function, *args)[1]:
        raise SideEffectError(f"{what} is not pure: {message}")


def two_calls(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """A function's program, and what differs in that of another call; "" for nothing."""
    first, second = (jax.make_jaxpr(fresh(function))(*args) for _ in range(2))
    message = ""
    if str(first) != str(second):
        message = "two calls are two programs: it depends on something that changes between calls"
    elif not all(map(same, first.consts, second.consts)):
        message = "two calls use different numbers: are there random ones, or a counter?"
    return first.jaxpr, message and f"{message}; hand in what changes as an argument"


def same(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same, keys and NaN too."""
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return bool(np.array_equal(a, b, equal_nan=np.issubdtype(np.asarray(a).dtype, np.floating)))


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
        {
            jax.tree_util.keystr(path) or "the output": f"{leaf.shape}"
            + ("" if jnp.issubdtype(leaf.dtype, jnp.floating) else " of no floating point")
            for path, leaf in side
        }
        for side in sides
    ]
    if described[0] != described[1]:
        first, second = (
            ", ".join(f"{path}: {shape}" for path, shape in side.items()) or "nothing"
            for side in described
        )
        raise ValueError(
            f"{name}: both sides must give outputs of the same tree and shapes, got {first} "
            f"beside {second}; return what the other returns"
        )
