"""`minigpt compress`: a model file, steps, a smaller model file. The flags are the rows of `STEPS`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt import checkpoint, measure, ops
from minigpt.checkpoint import Checkpoint
from minigpt.commands import common
from minigpt.compress import STEPS, Calibration, compress, recipe
from minigpt.compress.quantize import is_sparse
from minigpt.compress.step import Step
from minigpt.encodings import Weight
from minigpt.errors import OptionError

COLUMNS = {"bytes": ",.0f", "perplexity": ".4g", "bits_per_byte": ".4f", "kl": ".4f", "top1": ".3f"}


class Planned(argparse.Action):
    """Append to one plan whatever the flag, so that the order of the flags is the order of the steps."""

    def __call__(self, parser: Any, options: Any, value: Any, flag: str | None = None) -> None:
        """Keep (name of the step or "recipe", text)."""
        options.plan = [*options.plan, (self.dest, value)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Steps are taken in the order of their flags. A VALUE is that of the step's first parameter, name=value for "
        "another one, or several of them with commas between: --depth 6,method=greedy. Lists are written 0+1+5."
    )
    parser.add_argument("input", metavar="IN", help="a .mgpt file")
    parser.add_argument("output", metavar="OUT", help="the .mgpt file to write")
    parser.add_argument("--calibration", metavar="F", help='plain text, or .jsonl of {"text": ...}')
    parser.add_argument("--tokens", type=int, metavar="N", help="of the calibration to fit on (default: 16384)")
    parser.add_argument("--heal", action="store_true", help="refit in closed form after each step")
    parser.add_argument("--recipe", action=Planned, metavar="F.toml", help="steps from a file, [[step]] tables")
    for step in STEPS.values():
        parser.add_argument(f"--{step.flag}", dest=step.name, action=Planned, metavar="VALUE", help=described(step))
    parser.set_defaults(plan=())
    common.add_json(parser)


def described(step: Step) -> str:
    """Return the help of a step's flag."""
    notes = []
    for name, parameter in step.parameters.items():
        default = step.defaults.get(name)
        written = ("no", "yes")[default] if isinstance(default, bool) else default
        notes.append(f"{name}: {parameter.allowed}" + ("" if default is None else f" (default: {written})"))
    return f"{step.summary} {'; '.join(notes)}".replace("%", "%%")


def run(options: argparse.Namespace) -> None:
    """Compress, save and tell what each step did."""
    plan: recipe.Plan = []
    for name, value in options.plan:
        plan += recipe.read_recipe(value) if name == "recipe" else [recipe.from_flag(name, value)]
    if not plan:
        raise OptionError(f"nothing to do; give a step: --recipe, {', '.join('--' + s.flag for s in STEPS.values())}")
    if not (folder := Path(options.output).absolute().parent).is_dir():
        raise OptionError(f"cannot write {options.output}: there is no folder {folder}")
    before = checkpoint.load(options.input)
    limit = {} if options.tokens is None else {"n_tokens": options.tokens}
    text = Calibration.read(options.calibration, **limit) if options.calibration else None
    with progress_line() as progress:
        after = compress(before, plan, text, heal=options.heal, progress=progress)
    checkpoint.save(after, options.output)
    entries, sparse = after.history[len(before.history) :], sparse_forms(after)
    if options.json:
        print(json.dumps({"output": options.output, "steps": entries, "sparse": sparse}))
        return
    common.print_table(rows(entries))
    for form in sparse:
        speed = "" if form["speed"] is None else f", {form['speed']:.2f}x its speed here, from caches"
        print("{matrices} x {encoding} {shape}: {share:.0%} of the bytes of {dense}".format(**form) + speed)


def sparse_forms(model: Checkpoint) -> list[dict[str, Any]]:
    """Compare the first matrix of each sparse encoding and shape with its dense form: why it is stored so."""
    kinds: dict[tuple[str, str], list[Weight]] = {}
    for name in model.config.shapes():
        weight = model.weights[name]
        if is_sparse(weight.encoding):
            kinds.setdefault((weight.encoding.name, " x ".join(map(str, weight.shape))), []).append(weight)
    forms = []
    for (encoding, shape), weights in kinds.items():
        dense = weights[0].expand()
        timed = all(ops.has_kernel(f"matmul_{w.encoding.name}") for w in (weights[0], dense))
        forms.append(
            {
                "matrices": len(weights),
                "encoding": encoding,
                "shape": shape,
                "dense": dense.encoding.name,
                "share": sum(w.nbytes for w in weights) / (len(weights) * dense.nbytes),
                "speed": measure.relative_speed(weights[0], dense) if timed else None,
            }
        )
    return forms


def rows(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table: the model before, and after each step and its healing."""
    columns = [name for name in COLUMNS if name in entries[0]["before"]]

    def row(title: str, values: dict[str, Any]) -> tuple[str, ...]:
        return title, *(format(values[name], COLUMNS[name]) for name in columns)

    yield "", *(name.replace("_", " ") for name in columns)
    yield row("before", entries[0]["before"])
    for entry in entries:
        given = ",".join(f"{name}={value}" for name, value in entry["parameters"].items() if value is not None)
        yield row(f"{entry['step']} {given}", entry["after"])
        if "healed" in entry:
            yield row(f"  healed: {', '.join(entry['healed']['refits'])}", entry["healed"])


@contextmanager
def progress_line() -> Iterator[Callable[[str], None] | None]:
    """Give a function that shows what is being done in one line of a terminal, or None where there is none."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda message: print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
