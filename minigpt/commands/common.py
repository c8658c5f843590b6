"""What several verbs share: the options that mean the same everywhere, opening a model, tables, safe text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from os import PathLike

from minigpt import api, ops
from minigpt.cache import KINDS
from minigpt.checkpoint import Checkpoint


def add_model(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """Declare the model file; without one the embedded default serves."""
    text = "a .mgpt file (default: the embedded model)"
    if positional:
        parser.add_argument("model", nargs="?", metavar="FILE", help=text)
    else:
        parser.add_argument("-m", "--model", metavar="FILE", help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare the number of threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="default: the physical cores available")


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    """Declare how keys and values are kept."""
    text = "how to keep keys and values: %(choices)s (default: %(default)s); int8 takes a quarter of the memory"
    parser.add_argument("--kv-cache", choices=KINDS, default="f32", metavar="KIND", help=text)


def add_expand(parser: argparse.ArgumentParser) -> None:
    """Declare whether sparse matrices become dense in memory."""
    parser.add_argument(
        "--expand", action="store_true", help="make sparse matrices dense in memory: faster on some CPUs"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare machine-readable output."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def open_model(path: str | None) -> Checkpoint:
    """Open a model file, or the embedded default."""
    return api.open_checkpoint(path)


def model_path(path: str | None) -> str | PathLike[str]:
    """Return the file that `open_model` opens."""
    return api.default_path() if path is None else path


def announce_compiling(quiet: bool = False) -> None:
    """Say so once if kernels have to be compiled, which takes a while on the first run."""
    if not quiet:
        ops.COMPILING.append(lambda: note("compiling kernels for this machine, this first time only ..."))


def note(message: str) -> None:
    """Tell the person something that is not the result."""
    print(message, file=sys.stderr)


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows in aligned columns, the first column to the left, the others to the right."""
    cells = [tuple(printable(cell) for cell in row) for row in rows]
    if not cells:
        return
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for first, *rest in cells:
        columns = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        print("  ".join(columns).rstrip())


def printable(text: str) -> str:
    """Escape control characters: text from a file must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
