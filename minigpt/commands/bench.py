"""`minigpt bench`: speed, start-up and memory of a model on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from minigpt import measure, parts
from minigpt.commands import common
from minigpt.measure import Benchmark, Spread
from minigpt.model import GPT2

ROWS = {  # attribute of Benchmark: (label, unit, digits)
    "decode_tokens_per_s": ("decode, {n_tokens} tokens", "tokens/s", 1),
    "prefill_tokens_per_s": ("prefill, {n_prompt} tokens", "tokens/s", 0),
    "load_s": ("load, kernels at hand", "s", 4),
    "ttft_s": ("fresh process to first token", "s", 3),
    "token_ms_p50": ("time of a token, p50", "ms", 2),
    "token_ms_p95": ("time of a token, p95", "ms", 2),
    "peak_rss_mb": ("peak memory of a generation", "MB", 1),
    "pss_mb": ("proportional memory", "MB", 1),
    "mapped_mb": ("of which the mapped file", "MB", 1),
    "joules_per_token": ("energy per token", "J", 4),
    "cpu_ms_per_token": ("processor time per token", "ms", 2),
    "bandwidth_gb_s": ("bandwidth, bytes of a token", "GB/s", 1),
    "memory_gb_s": ("bandwidth, beyond caches", "GB/s", 1),
    "bandwidth_share": ("share of bandwidth used", "", 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = " ".join((measure.__doc__ or "").split("\n\n", 1)[1].split())
    common.add_model(parser, positional=True)
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens of the prefill (default: 512)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to decode (default: 128)")
    parser.add_argument("--runs", type=int, default=measure.RUNS, metavar="N", help="default: %(default)s")
    text = "instead: for what each microsecond of a token is spent, after a prompt of --prompt tokens (default: 16)"
    parser.add_argument("--parts", action="store_true", help=text)
    common.add_threads(parser)
    common.add_expand(parser)
    common.add_kv_cache(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    common.announce_compiling()
    if options.parts:
        _run_parts(options)
        return
    result = measure.benchmark(
        common.model_path(options.model),
        n_threads=options.threads,
        expand=options.expand,
        n_prompt=options.prompt,
        n_tokens=options.tokens,
        runs=options.runs,
        kv_cache=options.kv_cache,
    )
    if options.json:
        print(json.dumps(as_json(result)))
    else:
        _print(result)


def _run_parts(options: argparse.Namespace) -> None:
    model = GPT2(common.open_model(options.model), options.threads, options.kv_cache, options.expand)
    found = parts.time_parts(model, n_prompt=options.prompt, n_tokens=options.tokens, runs=options.runs)
    if options.json:
        print(json.dumps({label: dataclasses.asdict(part) for label, part in found.items()}))
        return
    total = sum(part.microseconds.median for part in found.values())
    rows: list[tuple[str, ...]] = [("microseconds of a token", "median", "min", "max", "share", "MB", "GB/s")]
    for label, part in found.items():
        time = part.microseconds
        cells = [f"{us:,.1f}" for us in (time.median, time.minimum, time.maximum)]
        read = (f"{part.n_bytes / 1e6:.1f}", f"{part.n_bytes / time.median / 1e3:.1f}") if part.n_bytes else ("", "")
        rows.append((label, *cells, f"{time.median / total:.1%}", *read))
    common.print_table([*rows, ("together", f"{total:,.1f}", "", "", "", "", "")])


def as_json(result: Benchmark) -> dict[str, Any]:
    """Return every median under its name, the lowest and highest as `<name>_min` and `<name>_max`, and the rest."""
    values: dict[str, Any] = {}
    for name, figure in _spreads(result):
        values |= {name: figure.median, f"{name}_min": figure.minimum, f"{name}_max": figure.maximum}
    return values | {
        "bytes_per_token": sum(result.bytes_per_token.values()),
        "bytes_per_token_by_part": result.bytes_per_token,
        "stages": {name: dataclasses.asdict(stage) for name, stage in result.start.stages.items()},
        "file_bytes": result.file_bytes,
        "prompt": result.n_prompt,
        "tokens": result.n_tokens,
        "runs": result.decode_tokens_per_s.runs,
        "machine": result.machine,
    }


def _spreads(result: Benchmark) -> Iterator[tuple[str, Spread]]:
    for name in ROWS:
        figure = getattr(result if hasattr(result, name) else result.start, name)
        if figure is not None:
            yield name, figure
    yield "cpu_s", result.start.cpu_s


def _print(result: Benchmark) -> None:
    figures = dict(_spreads(result))
    rows: list[tuple[str, ...]] = [("", "median", "min", "max", "")]
    for name in (name for name in ROWS if name in figures):
        (label, unit, digits), figure = ROWS[name], figures[name]
        cells = [f"{value:,.{digits}f}" for value in (figure.median, figure.minimum, figure.maximum)]
        rows.append((label.format(**vars(result)), *cells, unit))
    common.print_table(rows)

    total = sum(result.bytes_per_token.values())
    print(f"\nA token reads {total / 1e6:.1f} MB of weights; the file has {result.file_bytes / 1e6:.1f} MB.\n")
    common.print_table((part, f"{n / 1e6:.1f} MB", f"{n / total:.0%}") for part, n in result.bytes_per_token.items())

    print("\nA fresh process, part by part: seconds, processor seconds, growth of its peak memory:\n")
    common.print_table(
        (name, f"{stage.seconds.median:.3f} s", f"{stage.cpu_s.median:.3f} s", f"{stage.megabytes.median:.1f} MB")
        for name, stage in result.start.stages.items()
    )

    print()
    common.print_table((name.replace("_", " "), _words(value)) for name, value in result.machine.items())


def _words(value: Any) -> str:
    """Return a value for people: lists and mappings without brackets, nothing as a dash."""
    if isinstance(value, dict):
        value = [f"{name}={item}" for name, item in value.items()]
    return ", ".join(value) if isinstance(value, list) and value else str(value) if value else "-"
