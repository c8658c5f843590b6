"""`minigpt eval`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json

from minigpt import evaluate
from minigpt.commands import common
from minigpt.errors import OptionError
from minigpt.model import GPT2
from minigpt.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = " ".join((evaluate.__doc__ or "").split("\n\n", 1)[1].split())
    common.add_model(parser, positional=True)
    parser.add_argument("--text", required=True, metavar="F", help='plain text, or .jsonl of {"text": ...}')
    parser.add_argument("--reference", metavar="FILE", help="also compare with this model: kl, top1")
    parser.add_argument("--context", type=int, metavar="N", help="inputs per window (default: n_positions)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: context)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use only the beginning of the text")
    common.add_threads(parser)
    common.add_kv_cache(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print."""
    if options.max_tokens is not None and options.max_tokens < 1:
        raise OptionError(f"--max-tokens must be at least 1, not {options.max_tokens}")
    common.announce_compiling()
    documents = evaluate.read_documents(options.text)
    checkpoint = common.open_model(options.model)
    model = GPT2(checkpoint, options.threads, options.kv_cache)
    reference = None
    if options.reference is not None:
        reference = GPT2(common.open_model(options.reference), options.threads)
    ids = evaluate.encode_documents(Tokenizer(checkpoint.vocabulary), documents, checkpoint.config.eos_token_id)
    result = evaluate.evaluate(
        model,
        ids,
        checkpoint.vocabulary,
        context=options.context,
        stride=options.stride,
        reference=reference,
        max_tokens=options.max_tokens,
    )
    values = {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
    del values["windows"]
    if options.json:
        print(json.dumps(values))
    else:
        common.print_table((name.replace("_", " "), f"{value:.6g}") for name, value in values.items())
