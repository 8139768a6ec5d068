"""Backward passes to write, in order of difficulty."""

from backhand.audit.exercises import elementary, layers, losses, sequences
from backhand.audit.exercises.exercise import Exercise, Verdict
from backhand.protocol import suggestion

__all__ = ["Exercise", "Listing", "Verdict", "exercise", "exercises"]

_TASKS = {
    task.name: task
    for task in sorted(
        (*elementary.TASKS, *layers.TASKS, *losses.TASKS, *sequences.TASKS),
        key=lambda task: task.difficulty,
    )
}


class Listing(tuple[Exercise, ...]):
    """Exercises; printing it gives a line for each."""

    def __repr__(self) -> str:
        """A table: difficulty, name, what is computed."""
        width = max((len(each.name) for each in self), default=0)
        return "\n".join(
            f"{each.difficulty}  {each.name:{width}}  {each.forward.__doc__}" for each in self
        )


def exercise(name: str) -> Exercise:
    """A forward pass whose backward pass is to be written.

    Args:
        name: one that `exercises()` lists.

    Raises:
        ValueError: for another name.

    Example:
        >>> import backhand as bh
        >>> relu = bh.audit.exercise("relu")
        >>> print(relu.check(lambda x, dy: dy * 0).message)
        dx: zero everywhere: the path through `x` is missing
    """
    if name not in _TASKS:
        close = suggestion(str(name), _TASKS)
        raise ValueError(
            f"there is no exercise {name!r}{close}; bh.audit.exercises() lists all {len(_TASKS)}"
        )
    return Exercise(_TASKS[name])


def exercises() -> Listing:
    """All exercises, from the easiest to the hardest.

    Example:
        >>> import backhand as bh
        >>> print(bh.audit.exercises())
        1  scale                  y = a x, with one number a for the whole of x.
        1  square                 y = x^2, each element by itself.
        ...
    """
    return Listing(Exercise(task) for task in _TASKS.values())
