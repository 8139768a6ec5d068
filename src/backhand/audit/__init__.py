"""Is a hand-written gradient right? If not, how is it wrong, and what does it cost?"""

from backhand.audit.check import check
from backhand.audit.compare import compare
from backhand.audit.exercises import Exercise, exercise, exercises
from backhand.audit.report import Report, Row
from backhand.audit.result import Audit, Cause, Cost, Finding, Leaf, Side

__all__ = [
    "Audit",
    "Cause",
    "Cost",
    "Exercise",
    "Finding",
    "Leaf",
    "Report",
    "Row",
    "Side",
    "check",
    "compare",
    "exercise",
    "exercises",
]
