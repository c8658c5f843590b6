"""`minigpt convert`: a Hugging Face GPT-2 folder, LoRA merged if wanted, into a `.mgpt` file."""

from __future__ import annotations

import argparse
import os

from minigpt.commands import common
from minigpt.encodings import ENCODINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("src", metavar="SRC", help="folder with config.json, model.safetensors and a tokenizer")
    parser.add_argument("out", metavar="OUT", help="the .mgpt file to write")
    parser.add_argument("--lora", metavar="DIR", help="merge this PEFT LoRA folder")
    parser.add_argument("--encoding", default="int8", choices=list(ENCODINGS), help="of the matrices (default: int8)")


def run(options: argparse.Namespace) -> None:
    """Convert, and say what came out."""
    from minigpt.converters import convert

    checkpoint = convert(options.src, options.out, options.encoding, options.lora)
    size = os.path.getsize(options.out)
    common.note(f"{options.out}: {checkpoint.config.n_layer} layers, {options.encoding}, {size:,} bytes, verified")
