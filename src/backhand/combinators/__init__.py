"""Layers composed of layers."""

from backhand.combinators.compose import add, chain, parallel, skip
from backhand.combinators.modify import checkpoint, freeze, rename
from backhand.combinators.parts import on, pick
from backhand.combinators.repeat import repeat
from backhand.combinators.reversible import reversible
from backhand.combinators.share import share
from backhand.combinators.tally import tally

__all__ = [
    "add",
    "chain",
    "checkpoint",
    "freeze",
    "on",
    "parallel",
    "pick",
    "rename",
    "repeat",
    "reversible",
    "share",
    "skip",
    "tally",
]
