"""Layers composed of layers."""

from backhand.combinators.compose import add, chain, parallel, skip
from backhand.combinators.modify import checkpoint, freeze, rename
from backhand.combinators.repeat import repeat
from backhand.combinators.share import share

__all__ = ["add", "chain", "checkpoint", "freeze", "parallel", "rename", "repeat", "share", "skip"]
