"""`minigpt verify`: whether every byte of a file is as it was written, and the model makes sense."""

from __future__ import annotations

import argparse

import numpy as np

from minigpt import checkpoint
from minigpt import format as mgpt
from minigpt.commands import common
from minigpt.errors import FormatError
from minigpt.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="FILE", help="a .mgpt file")


def run(options: argparse.Namespace) -> None:
    """Check the checksums, then what they cannot know: finite values and a consistent vocabulary."""
    report = mgpt.verify(options.file)
    model = checkpoint.load(options.file)
    for name, weight in model.weights.items():
        for part, values in weight.parts.items():
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                raise FormatError(f"part {part!r} of {name} holds NaN or infinity; convert the model again")
    Tokenizer(model.vocabulary).prepare()
    print(f"{common.printable(options.file)}: intact ({report.parts} parts, {report.bytes:,} bytes)")
