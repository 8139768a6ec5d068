"""`python -m backhand`, the same as the command `backhand`."""

import sys

from backhand.cli import main

if __name__ == "__main__":
    sys.exit(main())
