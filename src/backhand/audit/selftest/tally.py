"""What a self-test counts: bugs planted, caught and named; right passes, and false alarms."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from backhand.audit.selftest.outcome import Outcome

CAUGHT, CAUSE = 0.99, 0.8
"""The shares of the bugs that must be caught, and whose cause must be named."""


@dataclasses.dataclass
class Count:
    """Of the bugs of one kind in one dtype.

    Attributes:
        planted: how many change the gradient by more than rounding.
        caught: of those, in how many the audit finds a leaf wrong.
        leaf_named: of those, in how many it names no leaf that is right.
        cause_named: of those caught, in how many it names a cause that the bug may show as.
        causes: what those caught were named as, and how many as each.
    """

    planted: int = 0
    caught: int = 0
    leaf_named: int = 0
    cause_named: int = 0
    causes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, outcome: Outcome, causes: frozenset[str]) -> None:
        """One more bug."""
        self.planted += 1
        self.caught += outcome.caught
        self.leaf_named += outcome.leaf_named
        if outcome.cause is not None:
            self.causes[outcome.cause.kind] += 1
            self.cause_named += outcome.cause.kind in causes


class Tally:
    """The counts by dtype and kind, and of right passes by dtype.

    Example:
        >>> tally = Tally()
        >>> tally.right("float32", "ops.tanh()", True)
        >>> tally.totals("float32")["correct"]
        1
    """

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], Count] = {}
        self.correct: collections.Counter[str] = collections.Counter()
        self.alarms: dict[str, list[str]] = {}
        self.audits = 0
        self.failed: list[str] = []
        self.missed: list[str] = []
        self.unnamed: list[str] = []

    def right(self, dtype: str, where: str, passes: bool) -> None:
        """One more audit of a right pass."""
        self.correct[dtype] += 1
        if not passes:
            self.alarms.setdefault(dtype, []).append(where)

    def audit(self, where: str, failures: Sequence[str]) -> None:
        """One more whole audit of a right row, every check of `bh.check`."""
        self.audits += 1
        if failures:
            self.failed.append(f"{where}: {'; '.join(failures)}")

    def bug(
        self, dtype: str, kind: str, where: str, outcome: Outcome, causes: frozenset[str]
    ) -> None:
        """One more bug, unless it leaves the gradient as it is."""
        if not outcome.changed:
            return
        self.kinds.setdefault((dtype, kind), Count()).add(outcome, causes)
        if not outcome.leaf_named:
            self.missed.append(f"{dtype}, {kind} in {where}: {sorted(outcome.named)}")
        elif outcome.cause is None or outcome.cause.kind not in causes:
            self.unnamed.append(f"{dtype}, {kind} in {where}: {outcome.cause}")

    def merge(self, other: "Tally") -> None:
        """Counts what another has counted."""
        for place, count in other.kinds.items():
            own = self.kinds.setdefault(place, Count())
            for name, value in vars(count).items():
                setattr(own, name, getattr(own, name) + value)
        self.correct += other.correct
        for dtype, alarms in other.alarms.items():
            self.alarms.setdefault(dtype, []).extend(alarms)
        self.audits += other.audits
        for name in ("failed", "missed", "unnamed"):
            getattr(self, name).extend(getattr(other, name))

    def totals(self, dtype: str) -> dict[str, int]:
        """All counts of a dtype."""
        own = [count for (other, _), count in self.kinds.items() if other == dtype]
        names = [field.name for field in dataclasses.fields(Count) if field.name != "causes"]
        sums = {name: sum(getattr(count, name) for count in own) for name in names}
        alarms = len(self.alarms.get(dtype, []))
        return {**sums, "correct": self.correct[dtype], "false_alarms": alarms}

    def to_dict(self) -> dict[str, Any]:
        """The counts by dtype, and by kind, as plain values."""
        rows = [
            {"kind": kind, "dtype": dtype, **vars(count), "causes": dict(count.causes)}
            for (dtype, kind), count in self.kinds.items()
        ]
        audits = {"correct": self.audits, "false_alarms": len(self.failed), "failed": self.failed}
        return {dtype: self.totals(dtype) for dtype in self.dtypes} | {
            "bh.check": audits,
            "kinds": rows,
        }

    @property
    def dtypes(self) -> list[str]:
        """Those that anything was counted in."""
        return sorted({dtype for dtype, _ in self.kinds} | set(self.correct))

    @property
    def failures(self) -> list[str]:
        """The targets that are missed, each in a sentence."""
        return list(self._failures())

    def _failures(self) -> Iterator[str]:
        if not self.kinds:
            yield "nothing was planted, so nothing is shown"
        if self.failed:
            yield f"bh.check: {len(self.failed)} of {self.audits} right rows fail"
        for dtype in self.dtypes:
            count = self.totals(dtype)
            planted, caught = count["planted"], count["caught"]
            if count["false_alarms"]:
                yield f"{dtype}: {count['false_alarms']} of {count['correct']} right passes fail"
            if caught < CAUGHT * planted:
                yield f"{dtype}: {caught} of {planted} bugs are caught, fewer than {CAUGHT:.0%}"
            if count["leaf_named"] < caught:
                others = caught - count["leaf_named"]
                yield f"{dtype}: of {caught} bugs that are caught, {others} name another leaf"
            if count["cause_named"] < CAUSE * caught:
                named = count["cause_named"]
                yield f"{dtype}: {named} of {caught} causes are named, fewer than {CAUSE:.0%}"
