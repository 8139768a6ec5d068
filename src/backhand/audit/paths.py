"""A reference with one mistake in its reverse pass, each of those that people make, one at a time.

The reference's program is run equation by equation. `chosen` says where its reverse is wrong: an
operand gets no error back, or, in a loop, what is multiplied in is that of the step before or
after. The forward stays right, and all mistakes are in one program, which is compiled once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backhand.arrays import is_floating
from backhand.audit.dtypes import MOVES
from backhand.audit.inlined import CALLS, bound_equation, called, line, scanned, traced
from backhand.visit import PyTree

MOST = 128
"""So many mistakes are tried, and no more."""

SUMS = frozenset({"cumsum", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"})

LINEAR = frozenset({"add", "cumsum", "neg", "reduce_sum", "select_n", "sub"}) | MOVES
"""What needs no number of the forward in its reverse."""

NONE = -1
"""The choice of no mistake."""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        kind: "sum", "path" or "step", of `backhand.audit.diagnosis.KINDS`.
        message: what it is.
    """

    kind: str
    message: str


class Mistakes:
    """A function with mistakes to choose from.

    Args:
        function: of arguments, JAX's own code alone.
        names: of the arguments' array leaves, in their order.

    Attributes:
        known: the mistakes, by number; filled when the function is first traced.
    """

    def __init__(self, function: Callable[..., PyTree], names: Sequence[str]):
        self._function, self._names = function, names
        self.known: list[Mistake] = []

    def __call__(self, chosen: Any, *arguments: PyTree) -> PyTree:
        """The function's value; its reverse makes the mistake of the number `chosen`."""
        program, arrays, structure = traced(self._function, arguments)
        run = _Run(chosen)
        origins = [
            frozenset({name}) if is_floating(leaf) else frozenset[str]()
            for name, leaf in zip(self._names, arrays, strict=True)
        ]
        found, _ = run.program(program.jaxpr, program.consts, arrays, origins)
        self.known = run.known
        return jax.tree.unflatten(structure, found)


Origins = frozenset[str]


class _Run:
    """One run of a program, which numbers the mistakes on its way."""

    def __init__(self, chosen: Any):
        self.chosen = chosen
        self.known: list[Mistake] = []

    def program(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        values: Sequence[Any],
        origins: Sequence[Origins],
        steps: "_Steps | None" = None,
    ) -> tuple[list[Any], list[Origins]]:
        """Its outputs, and the arguments that each comes from."""
        none = frozenset[str]()
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= dict(zip(jaxpr.invars, values, strict=True))
        of = dict(zip(jaxpr.invars, origins, strict=True))

        def value(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else known[atom]

        def origin(atom: Any) -> Origins:
            return none if hasattr(atom, "val") else of.get(atom, none)

        for equation in jaxpr.eqns:
            given = list(map(value, equation.invars))
            whence = list(map(origin, equation.invars))
            found, later = self._equation(equation, given, whence, steps)
            known |= dict(zip(equation.outvars, found, strict=True))
            of |= dict(zip(equation.outvars, later, strict=True))
        return list(map(value, jaxpr.outvars)), list(map(origin, jaxpr.outvars))

    def _equation(
        self, equation: Any, given: list[Any], origins: list[Origins], steps: "_Steps | None"
    ) -> tuple[list[Any], list[Origins]]:
        name = equation.primitive.name
        if name in CALLS:
            inner = called(equation)
            jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            return self.program(jaxpr, consts, given, origins, steps)
        every = frozenset[str]().union(*origins)
        later = [every] * len(equation.outvars)
        if name == "scan" and steps is None:
            return self._scan(equation.params, given, origins), later
        if name in MOVES or not every:
            return bound_equation(equation, given), later
        for place, own in enumerate(origins):
            others = frozenset[str]().union(*origins[:place], *origins[place + 1 :])
            if own and is_floating(given[place]) and (chosen := self._add(equation, own, others)):
                given[place] = _gated(given[place], chosen())
        if steps is not None and name not in LINEAR:
            return self._at_step(equation, given, origins, steps), later
        return bound_equation(equation, given), later

    def _add(self, equation: Any, own: Origins, others: Origins) -> Callable[[], Any] | None:
        """A mistake in what an operand of these arguments gets back; whether it is made."""
        name = equation.primitive.name
        if name in SUMS:
            axes = equation.params.get("axes", (equation.params.get("axis"),))
            what = "largest" if "max" in name else "smallest" if "min" in name else "sum or mean"
            mistake = Mistake(
                "sum",
                f"what comes back through the {what} over axis {', '.join(map(str, axes))} is left "
                f"out{line(equation)}: it is taken for a constant",
            )
        else:
            # What one argument meets names its path; later on, what has come together does.
            along = others - own if len(own) == 1 else own
            through = ", ".join(f"`{path}`" for path in sorted(along)[:3]) or f"`{name}`"
            mistake = Mistake("path", f"the path through {through} is missing{line(equation)}")
        return self._numbered(mistake)

    def _numbered(self, mistake: Mistake) -> Callable[[], Any] | None:
        if len(self.known) >= MOST:
            return None
        number = len(self.known)
        self.known.append(mistake)
        return lambda: self.chosen == number

    def _at_step(
        self, equation: Any, given: list[Any], origins: list[Origins], steps: "_Steps"
    ) -> list[Any]:
        """An equation of a loop, whose reverse may take an operand of another step."""
        saved = list(map(lax.stop_gradient, given))
        if not all(map(is_floating, given)):
            return bound_equation(equation, given)
        for place, own in enumerate(origins):
            if not own:
                continue
            before, after = steps.next(given[place])
            for other, word in ((before, "before"), (after, "after")):
                what = f"a number of `{equation.primitive.name}`{line(equation)} is that of the "
                made = self._numbered(
                    Mistake("step", f"{what}step {word}: the state of the wrong step")
                )
                if made is not None and other is not None:
                    saved[place] = jnp.where(made(), other, saved[place])
        return _stale(equation, given, saved)

    def _scan(self, params: Any, values: list[Any], origins: list[Origins]) -> list[Any]:
        """A loop: once to know what each step takes, and once with the mistakes."""
        constant, states = scanned(params)
        carried = constant + states
        every = frozenset[str]().union(*origins)
        inside = [*origins[:constant], *[every] * states, *origins[carried:]]
        jaxpr, consts = params["jaxpr"].jaxpr, params["jaxpr"].consts
        how = {name: params[name] for name in ("length", "reverse", "unroll")}
        count = len(self.known)

        def body(carry: list[Any], xs: Any) -> tuple[list[Any], Any]:
            inputs, moved = xs
            del self.known[count:]
            steps = _Steps(moved)
            given = [*values[:constant], *carry, *inputs]
            found, _ = self.program(jaxpr, consts, given, inside, steps)
            return found[:states], (found[states:], steps.taken)

        inputs, end = values[carried:], 0 if params["reverse"] else -1
        last, (_, taken) = lax.scan(body, values[constant:carried], (inputs, None), **how)
        # One step more, for what comes after the last: its state is where the loop ends.
        _, (_, beyond) = body(last, ([x[end] for x in inputs], None))
        moved = [
            lax.stop_gradient(_moved(x, more, params["reverse"]))
            for x, more in zip(taken, beyond, strict=True)
        ]
        last, (stacked, _) = lax.scan(body, values[constant:carried], (inputs, moved), **how)
        return [*last, *stacked]


class _Steps:
    """What the equations of one step take, and what they took the step before and after."""

    def __init__(self, moved: list[tuple[Any, Any]] | None):
        self.taken: list[Any] = []
        self._moved = moved

    def next(self, value: Any) -> tuple[Any, Any]:
        """The same number a step before and a step after; None, None while that is not known."""
        place = len(self.taken)
        self.taken.append(value)
        return (None, None) if self._moved is None else self._moved[place]


def _moved(x: Any, beyond: Any, reverse: bool) -> tuple[Any, Any]:
    """What is one step before, zero at the first, and one after, each step (T, ...)."""
    if reverse:
        x = jnp.flip(x, 0)
    before = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
    after = jnp.concatenate([x[1:], beyond[None]])
    return (jnp.flip(before, 0), jnp.flip(after, 0)) if reverse else (before, after)


@jax.custom_vjp
def _gated(x: Any, closed: Any) -> Any:
    """The value itself; no error comes back where the gate is closed."""
    return x


_gated.defvjp(
    lambda x, closed: (x, closed),
    lambda closed, dy: (jnp.where(closed, jnp.zeros_like(dy), dy), None),
)


def _stale(equation: Any, given: list[Any], saved: list[Any]) -> list[Any]:
    """What an equation gives, its reverse that of other operands."""

    def forward(given: list[Any]) -> list[Any]:
        return bound_equation(equation, given)

    @jax.custom_vjp
    def run(given: list[Any], saved: list[Any]) -> list[Any]:
        return forward(given)

    def backward(saved: list[Any], dy: list[Any]) -> tuple[list[Any], None]:
        return jax.vjp(forward, saved)[1](dy)[0], None

    run.defvjp(lambda given, saved: (forward(given), saved), backward)
    return list(run(given, saved))
