"""What an audit finds: a record for each leaf and each check, a verdict, a text to act on."""

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Cause:
    """How a gradient is wrong.

    Attributes:
        kind: one of `backhand.audit.diagnosis.KINDS`.
        message: one sentence, "32.0 x too large: a mean over the batch of 32 is missing".
    """

    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One differentiable leaf of one argument, under S random cotangents.

    Attributes:
        path: where it is in the arguments, as in "w", "x" or "params/hidden/w".
        shape: of the leaf.
        dtype: of the leaf as it was given.
        ours: its hand-written cotangents (S, *shape), in float64 if the subject runs in it.
        truth: the reference's (S, *shape), in float64; as `ours` where there is no reference.
        difference: the largest absolute difference.
        relative: that over the magnitude of the terms that are summed there.
        where: the index in the leaf of the element that is furthest beyond its tolerance.
        agrees: whether every element is within its tolerance.
        errors: by dtype, the relative errors of ours and of autodiff, both against the truth.
        cause: how it is wrong; None where it agrees.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    ours: np.ndarray = dataclasses.field(repr=False)
    truth: np.ndarray = dataclasses.field(repr=False)
    difference: float
    relative: float
    where: tuple[int, ...]
    agrees: bool
    errors: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    cause: Cause | None = None

    @property
    def not_finite(self) -> str:
        """Says how many elements its errors leave out, as the truth is not finite there; or ""."""
        count = int((~np.isfinite(self.truth)).any(axis=0).sum())
        if not count or not self.errors:
            return ""
        return (
            f"{self.path}: the truth is not finite at {count} of {self.truth[0].size} elements, "
            "which its errors leave out"
        )


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: which one: "gradient", "accuracy", "taylor", "structure", "jit", "vmap", ...
        path: the leaf that it is about; "" for the whole.
        passed: the verdict; True also for what was skipped.
        message: one sentence.
        cause: how it is wrong, where that is known.
        skipped: whether the check does not apply; the message says why.
    """

    check: str
    path: str
    passed: bool
    message: str
    cause: Cause | None = None
    skipped: bool = False


@dataclasses.dataclass(frozen=True)
class Side:
    """What one way to a value and its gradient costs.

    Attributes:
        milliseconds: the median time of a run.
        temporary_bytes: XLA's scratch memory; None where the backend does not say.
        flops: floating-point operations by XLA's count; None where the backend does not say.
        residual_bytes: what is kept between forward and backward, by its path among the residuals.
    """

    milliseconds: float
    temporary_bytes: int | None
    flops: float | None
    residual_bytes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of the hand-written and of the automatic way, in the dtype of the arguments."""

    manual: Side
    automatic: Side

    @property
    def time_ratio(self) -> float:
        """Manual over automatic: below 1, the hand-written way is faster."""
        return self.manual.milliseconds / self.automatic.milliseconds

    @property
    def residual_ratio(self) -> float | None:
        """Manual over automatic; None where the automatic way keeps nothing."""
        automatic = sum(self.automatic.residual_bytes.values())
        return sum(self.manual.residual_bytes.values()) / automatic if automatic else None

    @property
    def flops_ratio(self) -> float | None:
        """Manual over automatic; None where the backend does not say."""
        if not self.manual.flops or not self.automatic.flops:
            return None
        return self.manual.flops / self.automatic.flops


@dataclasses.dataclass(frozen=True)
class Audit:
    """All that `bh.check` found; printing it gives a text that begins with what is wrong.

    Attributes:
        name: of what was audited.
        leaves: one for each differentiable leaf of the arguments.
        findings: one or more for each check.
        cost: of both ways; None where there is only one, or it was not asked for.
    """

    name: str
    leaves: tuple[Leaf, ...]
    findings: tuple[Finding, ...]
    cost: Cost | None = None

    @property
    def passed(self) -> bool:
        """Whether every check that applies did."""
        return all(finding.passed for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What did not pass."""
        return tuple(finding for finding in self.findings if not finding.passed)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to ask for where something that failed is so by design."""
        kinds = {leaf.path: leaf.cause.kind for leaf in self.leaves if leaf.cause is not None}
        right = {leaf.path for leaf in self.leaves if leaf.agrees}
        # Where the rule's result is no tree of cotangents, zeros are not meant.
        odd = any(found.check == "structure" for found in self.failures)
        found = [
            f"if {path} is not to be differentiated: hold=({path!r},)"
            for path, kind in kinds.items()
            if kind == "zero" and not odd
        ]
        if "spurious" in kinds.values():
            found.append(
                "if a gradient other than the derivative is meant, as of a straight-through "
                "estimator: reference=, a function that has it, and skip=('taylor',)"
            )
        elif any(found.check == "taylor" and found.path in right for found in self.failures):
            found.append(
                "if a gradient other than the derivative is meant, as of a straight-through "
                "estimator: skip=('taylor',)"
            )
        return tuple(found)

    def assert_passed(self) -> None:
        """Passes if every check did.

        Raises:
            AssertionError: with the text, if one did not.
        """
        if not self.passed:
            raise AssertionError(f"the audit failed\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the gradients' elements as plain Python values, ready for JSON.

        A number that is not finite is a string, "inf" or "nan".
        """
        values = dataclasses.asdict(
            dataclasses.replace(self, leaves=()), dict_factory=lambda pairs: dict(pairs)
        )
        values |= {"passed": self.passed, "advice": self.advice}
        if self.cost is not None:
            ratios = ("time_ratio", "flops_ratio", "residual_ratio")
            values["cost"] |= {name: getattr(self.cost, name) for name in ratios}
        values["leaves"] = [
            {
                field.name: getattr(leaf, field.name)
                for field in dataclasses.fields(leaf)
                if field.name not in ("ours", "truth", "cause")
            }
            | {"cause": dataclasses.asdict(leaf.cause) if leaf.cause else None}
            for leaf in self.leaves
        ]
        return plain(values)

    def __str__(self) -> str:
        """The text, at most 100 columns wide."""
        return "\n".join(_lines(self))

    def _repr_html_(self) -> str:
        """The audit as a notebook shows it."""
        from backhand.audit.html import of_audit

        return of_audit(self)


def plain(value: Any) -> Any:
    """Values that `json.dumps` writes and that any reader reads back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sized(count: int | float) -> str:
    """A number of bytes to read: 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count = count / 1024
    return f"{count:.4g} GiB"


def _lines(audit: Audit) -> Iterator[str]:
    failures = audit.failures
    ran = [finding for finding in audit.findings if not finding.skipped]
    verdict = f"FAILED in {len(failures)} of {len(ran)}" if failures else f"passed {len(ran)} of"
    yield from _wrapped(f"{audit.name}: {verdict} {'' if failures else f'{len(ran)} '}checks", "")
    for finding in failures:
        where = f"{finding.path}: " if finding.path else ""
        why = f": {finding.cause.message}" if finding.cause else ""
        yield from _wrapped(f"WRONG  {where}{finding.message}{why} [{finding.check}]", "  ")
    for advice in audit.advice:
        yield from _wrapped(f"by design? {advice}", "  ")
    yield from _table(audit.leaves)
    done = dict.fromkeys(finding.check for finding in ran if finding.passed)
    failed = {finding.check for finding in failures}
    if passed := [check for check in done if check not in failed]:
        yield from _wrapped(f"passed: {', '.join(passed)}", "")
    for finding in audit.findings:
        if finding.skipped:
            where = f"{finding.path}: " if finding.path else ""
            yield from _wrapped(f"skipped: {finding.check}: {where}{finding.message}", "")
    if audit.cost is not None:
        yield from _cost(audit.cost)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_on_hyphens=False,
    )


def _table(leaves: tuple[Leaf, ...]) -> Iterator[str]:
    """A row a leaf; by dtype, the error of ours / of autodiff."""
    dtypes = list(dict.fromkeys(dtype for leaf in leaves for dtype in leaf.errors))
    head = ["leaf", "shape", "max diff", "relative", *(f"{d}*" for d in dtypes), ""]
    table = [head]
    for leaf in leaves:
        pairs = [leaf.errors.get(dtype) for dtype in dtypes]
        errors = [f"{pair[0]:.0e}/{pair[1]:.0e}" if pair else "" for pair in pairs]
        verdict = "agrees" if leaf.agrees else "DIFFERS"
        if leaf.ours is leaf.truth:
            verdict = "not compared"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        table.append(
            [leaf.path, shape, f"{leaf.difference:.1e}", f"{leaf.relative:.1e}", *errors, verdict]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    widths[1] = min(widths[1], 20)
    widths[0] = max(4, min(widths[0], WIDTH - 2 - sum(widths[1:]) - 2 * (len(head) - 1)))
    for line in table if leaves else []:
        cells = [
            cell if len(cell) <= width else "…" + cell[len(cell) - width + 1 :]
            for cell, width in zip(line, widths, strict=True)
        ]
        text = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield f"  {text}".rstrip()
    if dtypes:
        yield "  * the error of ours / of autodiff, against the truth in float64"
    for leaf in leaves:
        yield from _wrapped(leaf.not_finite, "  ")


def _cost(cost: Cost) -> Iterator[str]:
    """A line a side, and one of their ratios."""
    for name, side in (("manual", cost.manual), ("automatic", cost.automatic)):
        parts = [f"{side.milliseconds:.3g} ms"]
        if side.flops is not None:
            parts.append(f"{side.flops:.4g} flops")
        if side.temporary_bytes is not None:
            parts.append(f"{sized(side.temporary_bytes)} temporary")
        kept = sum(side.residual_bytes.values())
        named = ", ".join(f"{path} {sized(size)}" for path, size in side.residual_bytes.items())
        parts.append(f"{sized(kept)} kept" + (f" ({named})" if named else ""))
        yield from _wrapped(f"{name:9}: {', '.join(parts)}", "")
    yield f"time     : the hand-written way takes {cost.time_ratio:.2f} of the automatic one's"
