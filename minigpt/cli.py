"""The command line: arguments in, exit code out. Each verb lives in `commands/` and is imported when it is used.

Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 a MinigptError (one line), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from minigpt.errors import MinigptError

COMMANDS = {
    "generate": "continue a prompt",
    "eval": "measure perplexity, bits per byte and the distance to another model on a text",
    "inspect": "show what is in a .mgpt file",
    "verify": "check every byte of a .mgpt file against its checksums",
    "convert": "turn a Hugging Face GPT-2 folder into a .mgpt file",
    "export": "turn a .mgpt file back into a Hugging Face GPT-2 folder",
    "warmup": "compile the kernels that a model needs, once per device",
    "bench": "measure speed, memory and start-up of a model on this machine",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print one line and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code of the process."""
    try:
        command, options = _parse(arguments)
        status = importlib.import_module(f"minigpt.commands.{command}").run(options)
        sys.stdout.flush()
        return status or 0
    except MinigptError as error:
        print(f"minigpt: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone: stop quietly, as cat does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as leave:  # argparse: 0 after --help, 2 after a usage error
        return leave.code if isinstance(leave.code, int) else 2


def _parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    parser = Parser(prog="minigpt", description="GPT-2 inference and compression for small CPUs.")
    parser.add_argument("--version", action="version", version=f"minigpt {_version()}")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    chosen = next((a for a in arguments if a in COMMANDS), None)
    for name, summary in COMMANDS.items():
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:  # only this one's module is imported
            importlib.import_module(f"minigpt.commands.{name}").add_arguments(verb)
    return (options := parser.parse_args(arguments)).command, options


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("minigpt")
    except PackageNotFoundError:
        return "(not installed)"
