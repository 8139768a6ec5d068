"""The command line: `backhand compare` and `backhand check`."""

from backhand.cli.main import main

__all__ = ["main"]
