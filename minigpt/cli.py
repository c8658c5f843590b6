"""The command line: arguments in, exit code out. Each verb lives in `commands/` and is imported when it is used.

Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an error (one line), 2 wrong usage,
130 interrupted. Only bugs show a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from minigpt.errors import MinigptError

COMMANDS = {
    "generate": "continue a prompt",
    "eval": "measure perplexity, bits per byte and the distance to another model on a text",
    "inspect": "show what is in a .mgpt file",
    "verify": "check every byte of a .mgpt file against its checksums",
    "convert": "turn a Hugging Face GPT-2 folder into a .mgpt file",
    "compress": "trim, prune and quantize a model, step by step",
    "report": "compress a model in several ways and show on one page what it costs and what is left",
    "export": "turn a .mgpt file back into a Hugging Face GPT-2 folder",
    "warmup": "compile the kernels that a model needs, once per device",
    "bench": "measure speed, memory and start-up of a model on this machine",
}

INTERRUPTED = 128 + signal.SIGINT


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others, and whose options have one spelling."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print one line and leave with exit code 2."""
        self.exit(2, _line(f"{self.prog}: {message}; see {self.prog} --help") + "\n")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code of the process."""
    try:
        command, options = _parse(arguments)
        importlib.import_module(f"minigpt.commands.{command}").run(options)
        sys.stdout.flush()
        return 0
    except MinigptError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"not enough memory ({error}); take fewer samples, a shorter context or a smaller model")
    except OSError as error:  # commands report the files that they open: this is stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at exit
        if isinstance(error, BrokenPipeError):  # the reader has gone: stop quietly, as cat does
            return 0
        return _fail(f"cannot write the output: {error}; check where it goes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
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


def _fail(message: str) -> int:
    print(_line(f"minigpt: {message}"), file=sys.stderr)
    return 1


def _line(message: str) -> str:
    """Return a message as one line, whatever a file name or another library brought into it."""
    return " ".join(message.split())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("minigpt")
    except PackageNotFoundError:
        return "(not installed)"
