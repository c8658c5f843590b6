"""`minigpt report`: how a model bears compression, as one page with plots, a Markdown table and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from minigpt import report
from minigpt.commands import common
from minigpt.errors import OptionError
from minigpt.report import page, plots, stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL.mgpt", help="the fine-tuned model, best in f32")
    parser.add_argument(
        "--text", required=True, metavar="F", help='of its task: plain text, or .jsonl of {"text": ...}'
    )
    parser.add_argument("--raw", metavar="RAW.mgpt", help="the model that it was fine-tuned from")
    parser.add_argument("--raw-text", metavar="F", help="text that the raw model is meant for")
    parser.add_argument(
        "--calibration", metavar="F", help="text for recipes that look at activations, not that of --text"
    )
    parser.add_argument(
        "--recipe", action="append", metavar="F.toml", help=f"build this instead of: {', '.join(stages.RECIPES)}"
    )
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=FILE.mgpt", help="a finished file as a stage"
    )
    parser.add_argument("--output", default="report", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the text (default: 16384; with --quick 2048)")
    parser.add_argument("--quick", action="store_true", help="few tokens, points and runs: to see whether it works")
    common.add_threads(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, write three files and print the table."""
    if options.tokens is not None and options.tokens < 2:
        raise OptionError(f"--tokens must be at least 2, not {options.tokens}")
    if (options.raw is None) != (options.raw_text is None):
        raise OptionError("--raw and --raw-text belong together: the raw model is judged on its own text; give both")
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"cannot write to {folder}, which is no folder; give another --output")
    plots.library()  # or it would fail after all the work
    calibrated = options.calibration is not None
    recipes = stages.from_files(options.recipe, calibrated) if options.recipe else stages.RECIPES
    effort = report.QUICK if options.quick else report.FULL
    common.announce_compiling()
    result = report.make(
        options.model,
        options.text,
        raw=options.raw,
        raw_text=options.raw_text,
        calibration=options.calibration,
        recipes=recipes,
        finished=stages.given(options.stage),
        effort=effort if options.tokens is None else dataclasses.replace(effort, tokens=options.tokens),
        n_threads=options.threads,
        progress=phases(),
    )
    page.write(result, folder)
    if options.json:
        print(json.dumps(result))
    else:
        common.print_table(tuple(row) for row in page.stage_table(result, bounds=False))
        for sentence in result["verdicts"]:
            print(sentence)
        common.note(f"{folder / 'report.html'}, report.md, report.json")


def phases() -> Callable[[str], None]:
    """Return a listener that notes when each part of the work begins; what changes faster stands after a colon."""
    began, current = time.monotonic(), ""

    def tell(message: str) -> None:
        nonlocal current
        phase = message.rpartition(": ")[0] or message
        if phase != current:
            common.note(f"{(time.monotonic() - began) / 60:5.1f} min  {phase}")
        current = phase

    return tell
