"""`python -m minigpt` and the `minigpt` script: the command line with this process's arguments and streams."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def main() -> int:
    """Run the command line and return the exit code of the process."""
    from minigpt.cli import INTERRUPTED, run

    def end_if_interrupted(lost: Any) -> None:
        """Do what Ctrl-C asks for where Python would lose it: in a callback, and compilers call back."""
        if lost.exc_type is KeyboardInterrupt:
            os._exit(INTERRUPTED)
        sys.__unraisablehook__(lost)

    sys.unraisablehook = end_if_interrupted
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # models write characters that a terminal may not know
        sys.stdout.reconfigure(errors="backslashreplace")
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
