"""Is a hand-written gradient right?"""

from backhand.audit.compare import compare
from backhand.audit.report import Report, Row

__all__ = ["Report", "Row", "compare"]
