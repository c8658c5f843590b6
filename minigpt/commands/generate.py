"""`minigpt generate`: continue a prompt, streaming to stdout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator

from minigpt import api, ops
from minigpt.commands import common
from minigpt.errors import MinigptError, OptionError
from minigpt.sampling import SamplingOptions

EXAMPLE = "Product: Loan portal\nFeature: Loan renewal\n"  # a record, the embedded model's native form

SAMPLING = {  # the flags that are fields of SamplingOptions: (type, metavar, help)
    "temperature": (float, "T", "0 is greedy; higher is more varied"),
    "top_k": (int, "K", "only the K likeliest tokens; 0: all"),
    "top_p": (float, "P", "only the likeliest tokens that make up the share P"),
    "min_p": (float, "P", "only tokens at least P times as likely as the likeliest"),
    "typical_p": (float, "P", "only the most typical tokens that make up the share P"),
    "repetition_penalty": (float, "X", "above 1: make tokens of the text so far less likely"),
    "presence_penalty": (float, "X", "taken from the logit of each token of the text so far"),
    "frequency_penalty": (float, "X", "taken from the logit of a token for each of its uses"),
    "no_repeat_ngram": (int, "N", "never the same N tokens twice; 0: allowed"),
    "seed": (int, "N", "the same seed gives the same text"),
}

WHOLE = ("n", "n_beams", "length_penalty")  # with these there is no single text to stream
OPTIONS = (*SAMPLING, *WHOLE, "max_tokens", "logit_bias", "banned", "stop", "context_shift", "logprobs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of `MiniGPT.complete` are None unless given."""
    add = parser.add_argument
    add("prompt", nargs="?", help="default: a pipe if there is one, or else an example record")
    common.add_model(parser)
    add("--max-tokens", type=int, metavar="N", help=f"of each text (default: {api.MAX_TOKENS})")
    defaults = SamplingOptions()
    for name, (kind, metavar, text) in SAMPLING.items():
        default = getattr(defaults, name)
        shown = f"{text} (default: {default})" if default is not None else text
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=shown)
    add("--logit-bias", action="append", type=_bias, metavar="ID=X", help="add X to this token's logit; repeatable")
    add("--ban", dest="banned", action="append", type=int, metavar="ID", help="never this token; repeatable")
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("-n", type=int, metavar="N", help="so many samples, or hypotheses of a beam search")
    add("--beams", dest="n_beams", type=int, metavar="N", help="beam search instead of sampling")
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="of a beam search; above 0 favours long texts (default: 1.0)",
    )
    add("--context-shift", action="store_true", default=None, help="go on when the context is full")
    add("--logprobs", action="store_true", default=None, help="with --json: of each token")
    parser.add_argument("--no-echo", action="store_true", help="do not print the prompt")
    parser.add_argument("--quiet", action="store_true", help="no statistics")
    common.add_threads(parser)
    common.add_kv_cache(parser)
    common.add_expand(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Generate and print."""
    if options.logprobs and not options.json:
        raise OptionError("--logprobs is shown in JSON only; add --json or omit it")
    prompt = _prompt(options)
    common.announce_compiling(options.quiet)
    began = time.perf_counter()
    model = api.load(options.model, options.threads, options.kv_cache, options.expand)
    if options.logit_bias:
        options.logit_bias = dict(options.logit_bias)
    given = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    if not options.json and not given.keys() & WHOLE:
        _stream(model.pieces(prompt, **given), "" if options.no_echo else prompt, options.quiet, began)
        return
    completions = model.complete(prompt, **given)
    if options.json:
        print(json.dumps({"prompt": prompt, "completions": [dataclasses.asdict(c) for c in completions]}))
        return
    for number, completion in enumerate(completions, 1):
        score = "" if completion.score is None else f", score {completion.score:.4f}"
        if not options.quiet:
            common.note(f"--- {number} ({completion.finish_reason}{score})")
        print(("" if options.no_echo else prompt) + completion.text, flush=True)


def _stream(pieces: Iterator[api.Piece], echo: str, quiet: bool, began: float) -> None:
    times, reason = [began], None
    for piece in pieces:
        print(echo + piece.text, end="", flush=True)  # the prompt with the first: errors come before any output
        times.append(time.perf_counter())
        echo, reason = "", piece.finish_reason
    print(flush=True)
    if not quiet:
        n, spent = len(times) - 1, times[-1] - times[1]
        speed = f", {(n - 1) / spent:.0f} tokens/s" if n > 1 else ""
        first = f"first after {times[1] - began:.2f} s{speed}, {ops.backend()}"
        common.note(f"[{n} tokens, {first}, finished: {reason}]")


def _prompt(options: argparse.Namespace) -> str:
    try:
        if options.prompt is not None:
            options.prompt.encode()  # Python keeps what was not UTF-8 as lone surrogates
            return str(options.prompt)
        piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode()
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise MinigptError(f"the prompt is not UTF-8 (from {error.start} on); convert it first") from None
    return piped.rstrip("\r\n") or EXAMPLE  # as $(...) does: few models have learned to go on after an echo


def _bias(text: str) -> tuple[int, float]:
    id, _, bias = text.partition("=")
    try:
        return int(id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=X, such as 198=-2.5") from None
