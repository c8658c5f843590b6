"""`python -m minigpt` and the `minigpt` script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line with this process's arguments and return its exit code."""
    from minigpt.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
