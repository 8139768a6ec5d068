"""The catalogue: one table that knows every op, loss, layer and combinator.

What holds for all of them is tested, audited and measured by reading it.
"""

from backhand.catalogue.row import KINDS, SIZES, Row, Spec, make
from backhand.catalogue.table import ROWS

__all__ = ["KINDS", "ROWS", "SIZES", "Row", "Spec", "make"]
