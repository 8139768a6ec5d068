"""How a gradient is wrong: from its difference with the truth to the likely mistake."""

from backhand.audit.diagnosis.diagnose import DETECTORS, KINDS, diagnose
from backhand.audit.diagnosis.pair import Arrays, Context, Pair

__all__ = ["Arrays", "Context", "DETECTORS", "KINDS", "Pair", "diagnose"]
