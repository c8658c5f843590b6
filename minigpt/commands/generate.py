"""`minigpt generate`: continue a prompt, streaming to stdout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from minigpt import api, ops
from minigpt.commands import common
from minigpt.errors import MinigptError, OptionError
from minigpt.sampling import SamplingOptions

EXAMPLE = (
    "Product: Loan portal\nFeature: Loan renewal\n"  # in the form that the embedded model was trained on
)

HELP = {  # the flags of SamplingOptions: (type, metavar, help)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("prompt", nargs="?", help="read from a pipe if there is one; default: an example")
    common.add_model(parser)
    parser.add_argument(
        "--max-tokens", type=int, default=api.MAX_TOKENS, metavar="N", help="default: %(default)s"
    )
    defaults = SamplingOptions()
    for name, (kind, metavar, text) in HELP.items():
        default = getattr(defaults, name)
        shown = f"{text} (default: {default})" if default is not None else text
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar=metavar, help=shown
        )
    parser.add_argument(
        "--logit-bias", action="append", type=_bias, default=[], metavar="ID=X", help="may be repeated"
    )
    parser.add_argument("--ban", action="append", type=int, default=[], metavar="ID", help="never this token")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    parser.add_argument(
        "-n", type=int, default=1, metavar="N", help="so many samples, or hypotheses of a beam search"
    )
    parser.add_argument("--beams", type=int, metavar="N", help="beam search instead of sampling")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="of the beam search")
    parser.add_argument("--context-shift", action="store_true", help="go on when the context is full")
    parser.add_argument(
        "--logprobs", action="store_true", help="with --json: the log-probability of each token"
    )
    parser.add_argument("--no-echo", action="store_true", help="do not print the prompt")
    parser.add_argument("--quiet", action="store_true", help="no statistics")
    common.add_threads(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Generate and print."""
    prompt = _prompt(options)
    common.announce_compiling(options.quiet)
    began = time.perf_counter()
    model = api.load(options.model, options.threads)
    if options.beams is None and options.n == 1 and not options.json:
        _stream(model, prompt, options, began)
        return
    completions = model.complete(prompt, **_settings(options))
    if options.json:
        print(json.dumps({"prompt": prompt, "completions": [dataclasses.asdict(c) for c in completions]}))
        return
    for number, completion in enumerate(completions, 1):
        score = "" if completion.score is None else f", score {completion.score:.4f}"
        common.note(f"--- {number} ({completion.finish_reason}{score})")
        print(("" if options.no_echo else prompt) + completion.text, flush=True)


def _stream(model: api.MiniGPT, prompt: str, options: argparse.Namespace, began: float) -> None:
    if not options.no_echo:
        print(prompt, end="", flush=True)
    times, reason = [began], None
    for piece in model.pieces(prompt, **_settings(options)):
        print(piece.text, end="", flush=True)
        times.append(time.perf_counter())
        reason = piece.finish_reason
    print(flush=True)
    if not options.quiet:
        n, spent = len(times) - 1, times[-1] - times[1]
        speed = f", {(n - 1) / spent:.0f} tokens/s" if n > 1 else ""
        first = f"first after {times[1] - began:.2f} s{speed}, {ops.backend()}"
        common.note(f"[{n} tokens, {first}, finished: {reason}]")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `MiniGPT.complete`; those that do not apply are left out, or refused if given."""
    shared = {"max_tokens": options.max_tokens, "stop": options.stop}
    sampling: dict[str, Any] = {name: getattr(options, name) for name in HELP}
    sampling |= {"logit_bias": dict(options.logit_bias), "banned": options.ban}
    if options.beams is None:
        extra: dict[str, Any] = {"context_shift": options.context_shift, "logprobs": options.logprobs}
        return shared | sampling | extra | ({"n": options.n} if options.n != 1 else {})
    defaults = SamplingOptions()
    given = [
        name for name, value in sampling.items() if value != getattr(defaults, name) and value not in ({}, [])
    ]
    given += [name for name in ("context_shift", "logprobs") if getattr(options, name)]
    if given:
        raise OptionError(f"--beams does not go with --{given[0].replace('_', '-')}; omit one of them")
    return shared | {"n": options.n, "n_beams": options.beams, "length_penalty": options.length_penalty}


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return str(options.prompt)
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_stdin()
    return piped or EXAMPLE


def _read_stdin() -> str:
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MinigptError(f"the prompt is not UTF-8 (byte {error.start}); convert it first") from None


def _bias(text: str) -> tuple[int, float]:
    id, _, bias = text.partition("=")
    return int(id), float(bias)
