"""The check of signatures, made once for each."""

import inspect

from beartype import beartype

_made = {}


def check(function):
    """`beartype(function)`, for what jaxtyping makes of a signature and nothing else.

    A layer is closures, which are decorated whenever one is made, and beartype takes a millisecond
    for each. What jaxtyping hands over has no body of its own: all that it does is in its
    signature, which names the types that a module knows.
    """
    key = function.__module__, function.__qualname__, str(inspect.signature(function))
    if key not in _made:
        _made[key] = beartype(function)
    return _made[key]
