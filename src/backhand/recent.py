"""What was met lately, so that it need not be worked out again; the rest is forgotten."""

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")

MOST = 256
"""How many keys are remembered: more than a run has shapes of batches, sorted by length or not."""


class Recent(Generic[Value]):
    """Values by key, of the `most` keys that were last asked for or kept."""

    def __init__(self, most: int = MOST):
        self._most = most
        self._values: dict[Hashable, Value] = {}  # in the order of their last use
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Value | None:
        """The value of a key; None for one that is not remembered."""
        with self._lock:
            if key not in self._values:
                return None
            value = self._values[key] = self._values.pop(key)
            return value

    def keep(self, key: Hashable, value: Value) -> Value:
        """Remembers a value, and gives it back; forgets the key that was not used for longest."""
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = value
            if len(self._values) > self._most:
                del self._values[next(iter(self._values))]
            return value
