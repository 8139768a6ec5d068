"""A function without the custom rules in it: the plain code behind them, for JAX to differentiate.

`def loss(x, w): return layer_norm(x, w).sum()`, with a `jax.custom_vjp` function inside, has a
rule as much as that function itself. Its program is run here with every call of a rule replaced by
the code that the rule is for, so that JAX's own gradient of it is the truth.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backhand.audit.dtypes import programs
from backhand.audit.inputs import is_array
from backhand.visit import PyTree

RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
CALLS = frozenset({"checkpoint", "closed_call", "core_call", "jit", "pjit", "remat", "remat2"})

_JAX = str(Path(jax.__file__).parent)
_OWN = str(Path(__file__).parent)


def rules(function: Callable[..., PyTree], *arguments: PyTree) -> list[str]:
    """The names of the functions with a custom rule that a function calls, JAX's own left out.

    Example:
        >>> square = jax.custom_vjp(lambda x: x * x)
        >>> square.defvjp(lambda x: (x * x, x), lambda x, dy: (2 * x * dy,))
        >>> len(rules(lambda x: jax.nn.relu(square(x)), jnp.ones(3)))
        1
    """
    program, _, _ = traced(function, arguments)
    return list(_rules(program.jaxpr))


def without_rules(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function, which JAX differentiates by its plain code.

    Rules of JAX's own functions stay, such as `jax.nn.relu`'s, and those inside of what has no
    plain form: a kernel, a callback.
    """

    def plain(*arguments: PyTree) -> PyTree:
        program, arrays, structure = traced(function, arguments)
        return jax.tree.unflatten(structure, _run(program.jaxpr, program.consts, arrays))

    return plain


def traced(
    function: Callable[..., PyTree], arguments: tuple[PyTree, ...]
) -> tuple[Any, list[Any], Any]:
    """A function's program, the arrays that it takes, and the structure of what it gives."""
    structure: Any
    leaves, structure = jax.tree.flatten(arguments)
    places = [place for place, leaf in enumerate(leaves) if is_array(leaf)]

    def call(arrays: list[Any]) -> PyTree:
        given = dict(zip(places, arrays, strict=True))
        return function(*structure.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)]))

    arrays = [leaves[place] for place in places]
    program, shape = jax.make_jaxpr(call, return_shape=True)(arrays)
    return program, arrays, jax.tree.structure(shape)


def _rules(jaxpr: Any) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        if _is_rule(equation):
            found.append(_source(equation).split(" at ")[0])
            continue
        for inner in programs(equation.params.values()):
            found += _rules(inner)
    return found


def _is_rule(equation: Any) -> bool:
    """Whether this calls a function with a rule that is not JAX's own."""
    return equation.primitive.name in RULES and _JAX not in _source(equation)


def _source(equation: Any) -> str:
    """Where the function of a rule is written: "name at file:line"."""
    program = called(equation)
    return str(getattr(program, "jaxpr", program).debug_info.func_src_info)


def line(equation: Any) -> str:
    """Where an equation is written: " (line 12 of file.py)"; "" where that is not known."""
    traceback = getattr(equation.source_info, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith((_JAX, _OWN, "<")):
            return f" (line {frame.line_num} of {Path(frame.file_name).name})"
    return ""


def called(equation: Any) -> Any:
    """The program that an equation calls."""
    params = equation.params
    return next(params[name] for name in ("call_jaxpr", "jaxpr", "fun_jaxpr") if name in params)


def _run(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """A program's outputs, each rule on the way taken for its code."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else known[variable]

    for equation in jaxpr.eqns:
        found = _equation(equation, [read(variable) for variable in equation.invars])
        known |= dict(zip(equation.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _equation(equation: Any, values: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if _is_rule(equation):
        return _closed(called(equation))(*values)
    if any(_rules(inner) for inner in programs(params.values())):
        if name in CALLS:
            return _closed(called(equation))(*values)
        if name in _LOOPS:
            return list(_LOOPS[name](params, values))
    return bound_equation(equation, values)


def bound_equation(equation: Any, values: list[Any]) -> list[Any]:
    """What an equation gives of some values, as it is."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Before jax 0.10 the programs inside came beside the parameters, since then among them.
    functions, bound = ((), bound) if isinstance(bound, dict) else bound
    found = equation.primitive.bind(*functions, *values, **bound)
    return list(found) if equation.primitive.multiple_results else [found]


def _closed(program: Any) -> Callable[..., list[Any]]:
    """A program as a function; one without constants of its own has none to hand on."""
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    return lambda *values: _run(jaxpr, consts, values)


def _scan(params: Any, values: list[Any]) -> list[Any]:
    constant, states = scanned(params)
    carried = constant + states
    step = _closed(params["jaxpr"])

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        found = step(*values[:constant], *carry, *xs)
        return found[:states], found[states:]

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    last, stacked = lax.scan(body, values[constant:carried], values[carried:], **how)
    return [*last, *stacked]


def scanned(params: Any) -> tuple[int, int]:
    """How many constants a scan has, and how many states."""
    if "ft_in" not in params:  # before jax 0.12
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(list(constants)), len(list(carry))


def _cond(params: Any, values: list[Any]) -> list[Any]:
    return list(lax.switch(values[0], [_closed(b) for b in params["branches"]], *values[1:]))


def _while(params: Any, values: list[Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    goes_on, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    return list(
        lax.while_loop(
            lambda state: jnp.asarray(goes_on(*values[:first], *state)[0]),
            lambda state: body(*values[first:second], *state),
            values[second:],
        )
    )


_LOOPS: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
