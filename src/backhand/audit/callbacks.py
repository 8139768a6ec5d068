"""What a program calls on the host: each is a side effect, or looks like one."""

from collections.abc import Iterator
from typing import Any

from backhand.audit.dtypes import programs

KINDS = {
    "io_callback": "io_callback",
    "pure_callback": "pure_callback",
    "debug_callback": "jax.debug.callback",
    "debug_print": "jax.debug.print",
}
"""By the primitive, what a user calls it."""


def callbacks(jaxpr: Any) -> dict[str, str]:
    """The calls to the host in a program: what a user calls each, and the function's name or "".

    Example:
        >>> import jax
        >>> callbacks(jax.make_jaxpr(lambda x: jax.debug.print("{}", x))(1.0).jaxpr)
        {'jax.debug.print': ''}
    """
    found = {}
    for equation in _equations(jaxpr):
        if equation.primitive.name in KINDS:
            function = getattr(equation.params.get("callback"), "callback_func", None)
            name = getattr(function, "__name__", "")
            kind = KINDS[equation.primitive.name]
            # Earlier versions of JAX print by a callback of their own.
            kind = KINDS["debug_print"] if "format_print" in name else kind
            found[kind] = "" if name.startswith("<") else name
    return found


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in programs(equation.params.values()):
            yield from _equations(inner)
