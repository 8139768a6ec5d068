"""A backward pass for a learner to write, judged without giving it away."""

import contextlib
import dataclasses
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.diagnosis import diagnose
from backhand.audit.diagnosis.pair import Context
from backhand.audit.exercises.advice import advice, of_shape
from backhand.audit.exercises.task import Problem, Task, source
from backhand.audit.gradient import judge
from backhand.audit.result import Cause

WIDTH = 90


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of an attempt; true if it is right, and printing it says why not.

    Attributes:
        passed: whether every cotangent is right.
        message: what is right or wrong, a line for each.
        hint: where to look next; empty for an attempt that is right.
        causes: by cotangent, how it is wrong.
        error: what the attempt raised; None if it ran.
    """

    passed: bool
    message: str
    hint: str = ""
    causes: Mapping[str, Cause] = dataclasses.field(default_factory=dict)
    error: Exception | None = None

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        """The message, then the hint."""
        return f"{self.message}\nHint: {self.hint}" if self.hint else self.message


class Exercise:
    """A forward pass, and its backward pass to be written.

    Print it to see the forward, the question and an empty `backward`. `check` judges an attempt,
    `hint` says more each time, `solution` shows the answer.

    Example:
        >>> import backhand as bh
        >>> square = bh.audit.exercise("square")
        >>> print(square.check(lambda x, dy: -2 * x * dy).message)
        dx: the sign is flipped
        >>> bool(square.check(lambda x, dy: 2 * x * dy))
        True
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._hints_given = 0

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return self.task.name

    @property
    def difficulty(self) -> int:
        """From 1 to 5."""
        return self.task.difficulty

    @property
    def forward(self) -> Callable[..., tuple[Any, Any]]:
        """The forward pass, `(*arguments) -> (y, residuals)`."""
        return self.task.forward

    def __repr__(self) -> str:
        """Its name and difficulty: layer_norm (difficulty 4)."""
        return f"{self.name} (difficulty {self.difficulty})"

    def __str__(self) -> str:
        """The exercise, to read in a terminal."""
        forward, backward = (
            textwrap.indent(code, "    ")
            for code in (source(self.task.forward), self.task.template)
        )
        question = textwrap.fill(self.task.question, WIDTH)
        return f"{self!r}\n\n{forward}\n\n{question}\n\n{backward}"

    def _repr_markdown_(self) -> str:
        """The exercise, as a notebook shows it."""
        return (
            f"**{self!r}**\n\n```python\n{source(self.forward)}\n```\n\n{self.task.question}\n\n"
            f"```python\n{self.task.template}\n```"
        )

    def check(self, backward: Callable[..., Any]) -> Verdict:
        """Tries a backward pass under random errors of the output, in float64.

        Args:
            backward: `(residuals, dy)` -> one cotangent per argument of the forward, None for
                integers; a single one may stand alone. JAX or NumPy.

        Returns:
            The verdict: true if all is right. Otherwise it names what is wrong in which cotangent,
            and says where to look, not what to write.

        Raises:
            TypeError: for something other than a function.
        """
        if not callable(backward):
            raise TypeError(
                "check needs your function backward(residuals, dy) itself, without calling it; "
                f"got {type(backward).__name__}"
            )
        with _forgiving():
            problem = self.task.problem
            attempts: list[dict[int, np.ndarray]] = []
            for dy in problem.errors:
                try:
                    result = backward(problem.residuals, dy)
                except Exception as error:  # of the learner's code: any
                    return _raised(backward, error)
                cotangents = _cotangents(self.task, problem, result)
                if isinstance(cotangents, Verdict):
                    return cotangents
                attempts.append(cotangents)
            ours = {i: np.stack([attempt[i] for attempt in attempts]) for i in problem.truth}
            return _judged(self.task, problem, ours)

    def hint(self) -> str:
        """The next hint, each saying more than the one before."""
        hints = self.task.hints
        if self._hints_given == len(hints):
            return "No hints are left; solution(reveal=True) shows the answer."
        self._hints_given += 1
        return f"{self._hints_given} of {len(hints)}: {hints[self._hints_given - 1]}"

    def solution(self, *, reveal: bool = False) -> str:
        """The source of a right backward pass.

        Args:
            reveal: True, so that nobody sees it by accident.

        Raises:
            ValueError: without it.
        """
        if not reveal:
            raise ValueError(
                "the answer is shown only if you ask for it, by solution(reveal=True); hint() "
                "gives less away"
            )
        return source(self.task.backward)


@contextlib.contextmanager
def _forgiving() -> Iterator[None]:
    """Float64, and JAX's own rules of promotion, whatever the session has set."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _raised(backward: Callable[..., Any], error: Exception) -> Verdict:
    """The verdict on code that does not run: the error, and the learner's line that it is from."""
    code = getattr(backward, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    line = f", in line {own[-1].lineno}: {own[-1].line}" if own and own[-1].line else ""
    said = (str(error).strip().splitlines() or [""])[0]
    return Verdict(
        False,
        f"your backward raised {type(error).__name__}: {said}{line}",
        "print the shapes of the residuals and of dy, and go through it line by line.",
        error=error,
    )


def _cotangents(task: Task, problem: Problem, result: Any) -> dict[int, np.ndarray] | Verdict:
    """The cotangents by place, or the verdict on what cannot be them."""
    names = list(task.inputs)
    wanted = task.template.splitlines()[-1].strip()
    if result is None or result is ...:
        return Verdict(
            False, "your backward returned nothing.", f"it must end with a line: {wanted}"
        )
    given = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(given) != len(names):
        return Verdict(
            False,
            f"your backward returned {_counted(len(given))}; {task.name} has "
            f"{len(names)} argument{'s' if len(names) > 1 else ''}, {', '.join(names)}.",
            f"one for each argument, in their order: {wanted}",
        )
    found = {}
    for place, (name, value) in enumerate(zip(names, given, strict=True)):
        checked = _one(name, problem.arguments[place], value, place in problem.truth)
        if isinstance(checked, Verdict):
            return checked
        if checked is not None:
            found[place] = checked
    return found


def _one(name: str, argument: Any, value: Any, floating: bool) -> np.ndarray | Verdict | None:
    """A cotangent as an array, or the verdict on what cannot be one."""
    if not floating:
        if value is None:
            return None
        return Verdict(
            False,
            f"{name} holds {argument.dtype} numbers, which cannot move a little: they have no "
            "cotangent.",
            "return None in its place.",
        )
    if value is None:
        return Verdict(
            False, f"d{name} is None.", f"{name} moves the output, so it has a part in the blame."
        )
    try:
        array = np.asarray(value)
    except Exception:  # of whatever kind of object it is
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        kind = array.dtype if array.dtype != object else type(value).__name__
        return Verdict(
            False,
            f"d{name} is {kind}, where an array of {argument.dtype} is needed.",
            f"a cotangent has the shape and the dtype of its argument, here {name}.",
        )
    if array.shape != argument.shape:
        return Verdict(
            False,
            f"d{name} has shape {array.shape}, and {name} has {argument.shape}.",
            of_shape(name, array.shape, argument.shape),
        )
    if array.dtype != argument.dtype:
        return Verdict(
            False,
            f"d{name} is {array.dtype}, and {name} is {argument.dtype}.",
            "take the dtype of what comes in, and name none yourself.",
        )
    return array


def _judged(task: Task, problem: Problem, ours: Mapping[int, np.ndarray]) -> Verdict:
    """The verdict on the numbers."""
    names = {place: name for place, name in enumerate(task.inputs) if place in ours}
    truth = problem.truth
    verdicts = judge(list(names.values()), list(ours.values()), list(truth.values()))
    wrong = [place for place, found in zip(ours, verdicts, strict=True) if not found.agrees]
    if not wrong:
        return Verdict(True, f"Right: {_listed(names.values())}.")
    leaves = (np.asarray(leaf) for leaf in problem.arguments)
    inputs = dict(zip(task.inputs, leaves, strict=True))
    context = Context(
        shapes={
            "y": problem.errors[0].shape,
            **{name: leaf.shape for name, leaf in inputs.items()},
        },
        inputs=inputs,
        errors={"y": np.stack([np.asarray(dy) for dy in problem.errors])},
    )
    causes = {}
    for place in wrong:
        others = {names[i]: (ours[i], truth[i]) for i in ours if i != place}
        found = diagnose(ours[place], truth[place], others, context, names[place])
        causes[f"d{names[place]}"] = found or Cause(
            "nearly", "almost right, but not to the last digits"
        )
    lines = [f"{name}: {cause.message}" for name, cause in causes.items()]
    if right := [name for place, name in names.items() if place not in wrong]:
        lines.append(f"right: {_listed(right)}")
    first, cause = next(iter(causes.items()))
    hint = advice(cause, elementwise=_elementwise(problem, wrong[0]))
    return Verdict(False, "\n".join(lines), f"{first}: {hint}", causes)


def _elementwise(problem: Problem, place: int) -> bool:
    """Whether an argument's cotangent is dy times a factor for each element."""
    errors, truth = np.stack([np.asarray(dy) for dy in problem.errors]), problem.truth[place]
    return errors.shape == truth.shape and np.allclose(truth, truth[0] / errors[0] * errors)


def _counted(count: int) -> str:
    return "one cotangent" if count == 1 else f"{count} cotangents"


def _listed(names: Any) -> str:
    *first, last = (f"d{name}" for name in names)
    return f"{', '.join(first)} and {last}" if first else last
