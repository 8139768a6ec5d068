"""What `bh.check` takes, each kind in the one form that is audited."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from backhand.arrays import inverse, is_floating
from backhand.audit.inlined import rules, without_rules
from backhand.audit.inputs import check_arguments, check_takes, counted, is_array, readable
from backhand.audit.order import in_model_order
from backhand.audit.settings import references
from backhand.audit.subject import Rule, Subject, is_inside
from backhand.catalogue import Row
from backhand.gradients import Objective
from backhand.protocol import Layer, Op, listed, split_side, suggestion
from backhand.visit import PyTree


def subject_of(
    subject: Any,
    arguments: Sequence[PyTree],
    reference: Callable[..., PyTree] | None = None,
    name: str | None = None,
    side: Mapping[str, Any] | None = None,
    hold: Collection[str] = (),
) -> Subject:
    """What is given to `bh.check` as a subject.

    Raises:
        TypeError: for what is no function, or arguments that it does not take.
        ValueError: for an argument to hold that there is not.
    """
    if side is not None and not isinstance(side, Mapping):
        raise TypeError(
            f"side must be a dict, as in side={{'training': True}}, got {readable(side)}"
        )
    if isinstance(subject, Row):
        arguments = arguments or subject.arguments()
        made = _of_row(subject, tuple(arguments))
    elif isinstance(subject, Op):
        made = _of_op(subject, tuple(arguments))
    elif isinstance(subject, Layer):
        made = _of_layer(subject, tuple(arguments), dict(side or {}))
    elif isinstance(subject, Objective):
        made = _of_objective(subject, tuple(arguments), dict(side or {}))
    else:
        made = of_function(subject, tuple(arguments))
    if side and not isinstance(subject, Layer | Objective):
        raise TypeError(f"{made.name}: side inputs are a layer's or an objective's; give arguments")
    check_arguments(made.name, made.arguments, made.names)
    changed: dict[str, Any] = {"name": name or made.name, "kept": _kept(made, hold)}
    if reference is not None:
        if not callable(reference):
            raise TypeError(f"reference must be a function, got {readable(reference)}")
        if made.names[2:] == ("side",):
            plain = subject.plain if isinstance(subject, Row) else split_side(dict(side or {}))[1]
            reference = _with_side(reference, plain)
        changed |= {"reference": reference, "note": ""}
    made = dataclasses.replace(made, **changed)
    if made.reference is None:
        return made
    others = references(subject, made.reference, made.arguments, made.names)
    return dataclasses.replace(made, others=others)


def _kept(made: Subject, hold: Collection[str]) -> frozenset[str]:
    """The paths to hold, which must be some of the differentiable ones, and not all.

    Raises:
        ValueError: for another name.
    """
    hold = (hold,) if isinstance(hold, str) else hold
    for path in hold:
        if not any(is_inside(leaf, path) for leaf in made.paths):
            raise ValueError(
                f"{made.name}: there is no differentiable argument {path!r} to hold"
                f"{suggestion(path, made.paths)}; there are {listed(made.paths)}"
            )
    if hold and all(any(is_inside(leaf, path) for path in hold) for leaf in made.paths):
        raise ValueError(
            f"{made.name}: hold={tuple(hold)} leaves nothing to differentiate; there are "
            f"{listed(made.paths)}"
        )
    return frozenset(hold)


def _with_side(reference: Callable[..., PyTree], plain: Mapping[str, Any]) -> Callable[..., PyTree]:
    """A reference `(params, x, **side)` as a function of `(params, x, side)`."""
    return lambda params, x, side: reference(params, x, **side, **plain)


def of_function(function: Any, arguments: tuple[PyTree, ...]) -> Subject:
    """Any function; of a `jax.custom_vjp` one, its rule, and its primal code as the reference."""
    if not callable(function):
        raise TypeError(
            "needs an op, a layer, an objective, a row of the catalogue or a function, got "
            f"{readable(function)}"
        )
    if any(is_array(leaf) and is_floating(leaf) for leaf in jax.tree.leaves(function)):
        return _of_module(function, arguments)
    function, arguments = _opened(function, arguments)
    name = getattr(function, "__name__", type(function).__name__)
    names, arguments = bound(name, function, arguments, isinstance(function, jax.custom_vjp))
    rule, reference, held = None, None, frozenset[int]()
    if isinstance(function, jax.custom_vjp):
        if getattr(function, "bwd", None) is None:
            raise TypeError(f"{name} has no rule yet: call {name}.defvjp(forward, backward)")
        held = frozenset(place % max(len(arguments), 1) for place in function.nondiff_argnums)
        if not function.symbolic_zeros:
            rule = _rule_of(name, function, held)
        reference = function.fun
        note = f"the reference is {name}'s own code, differentiated by JAX"
    else:
        reference, note = _plain(name, function, arguments)
    return Subject(name, function, arguments, names, rule, reference, held, None, (), note)


def _of_module(module: Any, arguments: tuple[PyTree, ...]) -> Subject:
    """A function that holds arrays, a Flax NNX or Equinox module: they are its first argument."""
    name = type(module).__name__
    names, arguments = bound(name, module, arguments)
    made = of_function(lambda module, *given: module(*given), (module, *arguments))
    note = made.note.replace("<lambda>", name)
    return dataclasses.replace(made, name=name, names=("", *names), note=note)


def _plain(
    name: str, function: Callable[..., PyTree], arguments: tuple[PyTree, ...]
) -> tuple[Callable[..., PyTree] | None, str]:
    """The function without the custom rules inside of it, and what it is called."""
    try:
        inside = rules(function, *arguments)
    except Exception:  # what is wrong with it is said when it is run
        return None, ""
    if not inside:
        return function, f"{name} has no custom rule: JAX's gradient of it is held against its own"
    what = listed(dict.fromkeys(inside))
    return without_rules(function), f"the reference is {name}'s own code without the rule of {what}"


def _opened(
    function: Callable[..., Any], arguments: tuple[PyTree, ...]
) -> tuple[Callable[..., Any], tuple[PyTree, ...]]:
    """The `jax.custom_vjp` function inside of `jax.jit` and `functools.partial`, if any."""
    inner: Any = function
    given = arguments
    while not isinstance(inner, jax.custom_vjp):
        if isinstance(inner, functools.partial):
            try:
                signature = inspect.signature(getattr(inner.func, "__wrapped__", inner.func))
                given = signature.bind(*inner.args, *given, **inner.keywords).args
            except (TypeError, ValueError):
                return function, arguments
            inner = inner.func
        elif hasattr(inner, "lower") and hasattr(inner, "__wrapped__"):  # jax.jit's
            inner = inner.__wrapped__
        else:
            return function, arguments
    return inner, given


def _rule_of(name: str, function: Any, held: frozenset[int]) -> Rule:
    """The rule of a `jax.custom_vjp` function."""

    def forward(*arguments: PyTree) -> tuple[PyTree, PyTree]:
        check_takes(function.fwd, len(arguments), f"its forward must take what {name} itself takes")
        result = function.fwd(*arguments)
        if not isinstance(result, tuple | list) or len(result) != 2:
            got = f"{len(result)} values" if isinstance(result, tuple | list) else readable(result)
            raise TypeError(f"its forward must return a pair (y, residuals), got {got}")
        return result[0], result[1]

    def backward(arguments: tuple[PyTree, ...], residuals: PyTree, dy: PyTree) -> Any:
        fixed = [arguments[place] for place in sorted(held)]
        before = "the arguments of nondiff_argnums, " if fixed else ""
        what = f"its backward must take ({before}residuals, dy)"
        check_takes(function.bwd, len(fixed) + 2, what)
        given = function.bwd(*fixed, residuals, dy)
        if not isinstance(given, tuple | list) or not held:
            return given
        rest = iter(given)
        cotangents = [None if i in held else next(rest, None) for i in range(len(arguments))]
        return (*cotangents, *rest)

    return Rule(forward, backward)


def _of_op(op: Op, arguments: tuple[PyTree, ...]) -> Subject:
    names, arguments = bound(op.name, op.forward, arguments)

    def backward(_: Any, residuals: PyTree, dy: PyTree) -> Any:
        # An optional array that was left out has no cotangent to give.
        return op.cotangents(residuals, dy)[: max(len(arguments), _required(op))]

    return Subject(op.name, op, arguments, names, Rule(op.forward, backward), op.reference)


def _required(op: Op) -> int:
    """How many arrays the op cannot do without."""
    parameters = inspect.signature(op.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _of_row(row: Row, arguments: tuple[PyTree, ...]) -> Subject:
    if isinstance(row.function, Op):
        made = _of_op(row.function, arguments)
    else:
        params, x, side = arguments
        made = _of_layer(row.function, (params, x), {**side, **row.plain})
    low = jax.tree.leaves(jax.eval_shape(lambda: row.arguments(jnp.bfloat16)))
    wide = frozenset(
        path for path, leaf in zip(made._flat[0], low, strict=True) if leaf.dtype != jnp.bfloat16
    )
    note = ""
    if isinstance(row.function, Layer) and row.textbook is None:
        note = made.note
    return dataclasses.replace(made, name=repr(row), reference=row.reference, wide=wide, note=note)


def _of_layer(layer: Layer, arguments: tuple[PyTree, ...], given: dict[str, Any]) -> Subject:
    if len(arguments) != 2:
        raise TypeError(
            f"{layer.name}: a layer is checked at (params, x), with side={{...}} for what else it "
            f"uses; got {counted(len(arguments), 'argument')}"
        )
    layer._known(given)
    params, x = arguments
    if is_array(params) and isinstance(x, Mapping):
        raise TypeError(
            f"{layer.name}: a layer is checked at (params, x), in this order; got "
            f"{readable(params)}, then {readable(x)}"
        )
    arrays, settings = split_side(given)
    check_arguments(layer.name, (params, x), ("params", "x"))

    def forward(params: PyTree, x: PyTree, side: PyTree) -> tuple[PyTree, PyTree]:
        return layer.forward(params, x, **side, **settings)

    def backward(arguments: tuple[PyTree, ...], residuals: PyTree, dy: PyTree) -> Any:
        params, _, side = arguments
        result = layer.backward(params, residuals, dy, **side, **settings)
        return (*result, None)

    entries = jax.tree_util.tree_leaves_with_path(params)
    wide = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in entries}
    order = tuple(path for path, _ in in_model_order(layer, params))
    return Subject(
        layer.name,
        lambda *arguments: forward(*arguments)[0],
        (params, x, arrays),
        ("", "x", "side"),
        Rule(forward, backward),
        lambda *arguments: forward(*arguments)[0],
        frozenset({2}),
        frozenset(wide),
        order,
        "the reference is the layer's own forward, differentiated by JAX",
    )


def _of_objective(
    objective: Objective, arguments: tuple[PyTree, ...], given: dict[str, Any]
) -> Subject:
    if len(arguments) != 2:
        raise TypeError(
            "an objective is checked at (params, batch), with side={'key': ...} where its model "
            f"uses one; got {counted(len(arguments), 'argument')}"
        )
    params, batch = arguments
    check_arguments("objective", (params, batch), ("params", "batch"))
    objective.check(params, batch, **given)
    arrays, settings = split_side(given)

    def forward(params: PyTree, batch: PyTree, side: PyTree) -> tuple[PyTree, PyTree]:
        terms, residuals = objective.forward(params, batch, **side, **settings)
        return terms.mean(), (residuals, terms.weight)

    def backward(arguments: tuple[PyTree, ...], residuals: PyTree, dy: PyTree) -> Any:
        (params, batch, side), (saved, weight) = arguments, residuals
        dtotal = jax.tree.map(lambda w: dy * inverse(w), weight)
        dparams = objective.backward(params, saved, dtotal, batch, **side, **settings)
        return dparams, None, None

    order = tuple(path for path, _ in in_model_order(objective.model, params))
    inputs = {f"batch/{name}" for name in batch if name != "inputs"}
    made = Subject(
        "objective",
        lambda *arguments: forward(*arguments)[0],
        (params, dict(batch), arrays),
        ("", "batch", "side"),
        Rule(forward, backward),
        lambda *arguments: forward(*arguments)[0],
        frozenset({1, 2}),
        None,
        order,
        "the reference is the objective itself, differentiated by JAX",
    )
    wide = {p for p in made._flat[0] if p in order or any(p.startswith(name) for name in inputs)}
    return dataclasses.replace(made, wide=frozenset(wide))


def bound(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[PyTree, ...],
    complete: bool = False,
) -> tuple[tuple[str, ...], tuple[PyTree, ...]]:
    """The names of the arguments, where `inspect` knows them, else their numbers.

    `complete` adds the defaults of those that were left out, as `jax.custom_vjp` does.

    Raises:
        TypeError: for arguments that the function does not take.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return tuple(map(str, range(len(arguments)))), arguments
    try:
        given = signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{name}{_plainly(signature)} does not take {counted(len(arguments), 'argument')}: "
            f"{error}"
        ) from None
    if complete:
        given.apply_defaults()
        arguments = given.args
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}{i}" for i in range(len(arguments) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return tuple(names[: len(arguments)]), arguments


def _plainly(signature: inspect.Signature) -> inspect.Signature:
    """A signature without annotations, which would fill a line each."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)
