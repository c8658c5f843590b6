"""`minigpt export`: a `.mgpt` file back into a Hugging Face GPT-2 folder."""

from __future__ import annotations

import argparse

from minigpt.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="FILE", help="a .mgpt file")
    parser.add_argument("folder", metavar="DIR", help="the folder to make")
    parser.add_argument("--dtype", default="f32", choices=("f32", "f16"), help="of the weights (default: f32)")


def run(options: argparse.Namespace) -> None:
    """Export, and say what came out."""
    from minigpt.converters.export import export

    checkpoint = common.open_model(options.file)
    export(checkpoint, options.folder, options.dtype)
    common.note(f"{options.folder}: {checkpoint.config.n_layer} layers, {options.dtype}, in Hugging Face's layout")
