"""What each way of compressing costs in quality and saves in bytes and time: the table of docs/compression.

    python benchmarks/compression.py measure NAME --model MODEL.mgpt --calibration F --text F   # row by row
    python benchmarks/compression.py speed NAME                                                 # on a quiet machine
    python benchmarks/compression.py table                                                      # again, from WORK

Every row is one step on the f32 model. Quality is that of what the step returns, on text that it has not seen: the
ratio of perplexities (through bits per byte, so that vocabularies may differ), KL and top-1 agreement against the model
before, then the same after healing. Bytes and speed are those of the file in which it would be shipped: matrices that a
step leaves in f32 are stored as int8, pruned ones in the smallest form of their int8 codes. Rows are appended to
WORK/NAME.jsonl as they are done and never done twice, so a run may be stopped; WORK keeps the files for the second
command.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minigpt import checkpoint as mgpt
from minigpt import measure
from minigpt.checkpoint import Checkpoint
from minigpt.compress import STEPS, Calibration, heal, quantize
from minigpt.compress.calibration import Floats, Ids, Judge
from minigpt.compress.heal import Pair
from minigpt.compress.step import updated
from minigpt.encodings.int4 import Int4
from minigpt.evaluate import encode_documents, read_documents
from minigpt.model import GPT2
from minigpt.tokenizer import Tokenizer

N_FIT, N_HELD_OUT, N_TEXT = 4096, 1024, 2048  # tokens to fit on, to choose refits by, to measure by
PASSAGE = 2000  # characters of each document that may be measured by
TOKENS, ROUNDS = 48, 4  # decoded to time a model
RESHAPING = ("vocabulary", "context")  # change what a model is fed: nothing to compare token by token, nothing to heal


class Int3(Int4):
    """A trial: 3-bit codes, 4 bits a weight with scale and minimum of the group. Stored as int4: it has no kernel."""

    name = "int3"
    highest = 7

    def fit(self, w: Floats, symmetric: bool = False) -> tuple[Floats, Floats]:
        """Span the group's range with 7 steps."""
        scales, minimums = super().fit(w)
        return (scales * np.float32(15 / 7)).astype(np.float16).astype(np.float32), minimums


def prune(criterion: str, sparsity: float, **more: Any) -> tuple[str, dict[str, Any]]:
    return "prune", {"criterion": criterion, "sparsity": sparsity, **more}


def rounded(encoding: str, method: str = "rtn", **more: Any) -> tuple[str, dict[str, Any]]:
    return "quantize", {"encoding": encoding, "method": method, **more}


# what the table calls it: (step, parameters), in the order of the table
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "depth 9, symmetric": ("depth", {"n_layer": 9}),
    "depth 6, symmetric": ("depth", {"n_layer": 6}),
    "depth 9, angular": ("depth", {"n_layer": 9, "method": "angular"}),
    "depth 6, angular": ("depth", {"n_layer": 6, "method": "angular"}),
    "depth 9, greedy": ("depth", {"n_layer": 9, "method": "greedy"}),
    "depth 6, greedy": ("depth", {"n_layer": 6, "method": "greedy"}),
    "width 640, energy": ("width", {"n_embd": 640}),
    "width 384, energy": ("width", {"n_embd": 384}),
    "width 640, pca": ("width", {"n_embd": 640, "method": "pca"}),
    "width 384, pca": ("width", {"n_embd": 384, "method": "pca"}),
    "heads -25 %": ("heads", {"remove": 0.25}),
    "heads -50 %": ("heads", {"remove": 0.5}),
    "neurons -25 %": ("neurons", {"remove": 0.25}),
    "neurons -50 %": ("neurons", {"remove": 0.5}),
    "vocabulary 16,384": ("vocabulary", {"size": 16384}),
    "vocabulary 8,192": ("vocabulary", {"size": 8192}),
    "context 512": ("context", {"n_positions": 512}),
    "context 256": ("context", {"n_positions": 256}),
    **{
        f"{criterion} {sparsity:.0%}".replace("%", " %"): prune(criterion, sparsity)
        for criterion in ("magnitude", "wanda", "sparsegpt", "alps")
        for sparsity in (0.4, 0.5, 0.6)
    },
    "sparsegpt 50 %, 16,384 tokens": prune("sparsegpt", 0.5, tokens=16384),
    "alps 50 %, 16,384 tokens": prune("alps", 0.5, tokens=16384),
    "sparsegpt 2:4": prune("sparsegpt", 0.5, pattern="2:4"),
    "alps 2:4": prune("alps", 0.5, pattern="2:4"),
    "int8": rounded("int8"),
    "int4, to nearest": rounded("int4"),
    "int4, AWQ": rounded("int4", fold="awq"),
    "int4, GPTQ": rounded("int4", "gptq"),
    "int4_g128, GPTQ": rounded("int4_g128", "gptq"),
    "3 bits, to nearest": rounded("int3"),
    "3 bits, GPTQ": rounded("int3", "gptq"),
    "codebook of 16": ("codebook", {"encoding": "codebook4"}),
    "codebook of 256": ("codebook", {"encoding": "codebook8"}),
    "low rank, 75 %": ("lowrank", {"share": 0.75}),
    "low rank, 50 %": ("lowrank", {"share": 0.5}),
    "sparsegpt 40 % + int8": prune("sparsegpt", 0.4, encoding="sparse"),
    "sparsegpt 2:4 + int4": prune("sparsegpt", 0.5, pattern="2:4", encoding="nm_int4"),
}


def take(before: Checkpoint, step: str, parameters: dict[str, Any], calibration: Calibration) -> Checkpoint:
    """Take a step, fitted on more than N_FIT tokens if it says so; the trial encoding is none that steps offer."""
    parameters = dict(parameters)
    calibration = replace(calibration, n_tokens=parameters.pop("tokens", N_FIT))
    if parameters.get("encoding") != Int3.name:
        return STEPS[step](before, calibration, **parameters)
    return quantize.requantize(before, calibration, quantize.assigned(before, Int3.name), parameters["method"])


def storable(cut: Checkpoint) -> Checkpoint:
    """Return what would be shipped: what is still in f32 in the smallest form of its int8 codes."""
    trial = {name: w.expand() for name, w in cut.weights.items() if w.encoding.name == Int3.name}
    plan = quantize.assigned(cut, "sparse")
    plan = {name: encoding for name, encoding in plan.items() if cut.weights[name].encoding.name.startswith("f32")}
    return quantize.requantize(updated(cut, trial), None, plan)


class Remembering(Judge):
    """A judge that holds what the reference predicts, 200 kB a token, in place of computing it every time."""

    @cached_property
    def _predictions(self) -> dict[int, Floats]:
        return {part.start: super(Remembering, self).expected(part) for part in self.parts()}

    def expected(self, part: slice) -> Floats:
        """Look up."""
        return self._predictions[part.start]


@dataclass(frozen=True)
class RememberingPair(Pair):
    """A pair that holds the reference's residual streams, 77 kB a token at 124M."""

    remembered: list[Floats] = field(default_factory=list)

    def streams(self) -> Iterator[Floats]:
        """Compute the first time."""
        if not self.remembered:
            self.remembered.extend(super().streams())
        return iter(self.remembered)


class Subject:
    """A model, what it is fitted on and what it is measured by."""

    def __init__(self, model: Path, calibration: Path, text: Path) -> None:
        self.checkpoint = mgpt.load(model)
        self.calibration = Calibration.read(calibration, n_tokens=N_FIT, n_held_out=N_HELD_OUT)
        self.documents = read_documents(text)
        passages = [document[:PASSAGE] for document in self.documents]
        self.passages = passages[:: max(1, round(len(self.encoded(self.checkpoint, passages)) / N_TEXT))]
        self.judge = Remembering(self.checkpoint, self.windows(self.checkpoint))
        self.before = self.judge.measure(self.checkpoint)
        self.pair = RememberingPair(self.checkpoint, (), self.calibration.fitting(self.checkpoint))

    @cached_property
    def held_out(self) -> Judge:
        """What refits are chosen by."""
        return Remembering(self.checkpoint, self.calibration.held_out(self.checkpoint))

    def encoded(self, checkpoint: Checkpoint, documents: list[str]) -> Ids:
        """Return the tokens of documents, joined."""
        return encode_documents(Tokenizer(checkpoint.vocabulary), documents, checkpoint.config.eos_token_id)

    def windows(self, checkpoint: Checkpoint, least: int = 1) -> Ids:
        """Cut the passages into equal windows, as few as the positions allow and `least`: [n_windows, window + 1]."""
        ids = self.encoded(checkpoint, self.passages)
        n = max(least, -(-(len(ids) - 1) // checkpoint.config.n_positions))
        window = (len(ids) - 1) // n
        return np.stack([ids[i * window : (i + 1) * window + 1] for i in range(n)])

    def cut(self, step: str, parameters: dict[str, Any], path: Path) -> dict[str, Any]:
        """Take a step and measure what comes of it, which the file keeps."""
        began = time.perf_counter()
        cut = take(self.checkpoint, step, parameters, self.calibration)
        seconds = round(time.perf_counter() - began, 1)
        mgpt.save(cut, path)
        figures = self.reshaped(cut) if step in RESHAPING else self.figures(self.judge.measure(cut))
        return {"seconds": seconds, **figures}

    def heal(self, path: Path) -> dict[str, Any]:
        """Heal what `cut` has left."""
        cut = mgpt.load(path)
        layers = (cut.history[-1] if cut.history else {}).get("layers", range(cut.config.n_layer))
        began = time.perf_counter()
        pair = replace(self.pair, layers=layers)
        healed, _, refits = heal.heal(cut, pair, self.held_out, self.held_out.measure(cut))
        seconds = round(time.perf_counter() - began, 1)
        return {"healed": {"refits": refits, "seconds": seconds, **self.figures(self.judge.measure(healed))}}

    def reshaped(self, cut: Checkpoint) -> dict[str, float]:
        """Compare bits per byte of the same text; fewer tokens see each other where positions are what is cut."""
        windows = self.windows(cut)
        before = self.before
        if cut.config.n_positions == self.checkpoint.config.n_positions:
            same = self.windows(self.checkpoint, len(windows))
            before = Judge(self.checkpoint, same).measure(self.checkpoint)
        after = Judge(cut, windows).measure(cut)
        old, new = (len(self.encoded(c, self.documents)) for c in (self.checkpoint, cut))
        return {"ratio": ratio(after, before), "tokens": new / old}

    def figures(self, after: dict[str, float]) -> dict[str, float]:
        """Return the columns of quality."""
        return {"ratio": ratio(after, self.before), "kl": after["kl"], "top1": after["top1"]}


def ratio(after: dict[str, float], before: dict[str, float]) -> float:
    """Return the ratio of perplexities, by a token of the vocabulary before."""
    return float(before["perplexity"] ** (after["bits_per_byte"] / before["bits_per_byte"] - 1))


# ---- the three commands --------------------------------------------------------------------------------------


def measure_rows(options: argparse.Namespace) -> None:
    """Cut and measure what is not yet in WORK/NAME.jsonl, then heal it."""
    found = results(options.work).get(options.name, {})
    names = list(dict.fromkeys(name for pattern in options.only for name in ROWS if re.search(pattern, name)))
    to_cut = [name for name in names if name not in found]
    to_heal = [name for name in names if ROWS[name][0] not in RESHAPING and "healed" not in found.get(name, {})]
    subject = Subject(options.model, options.calibration, options.text)
    for name in to_cut:
        note(options.work, options.name, name, subject.cut(*ROWS[name], file_of(options.work, options.name, name)))
    for name in to_heal if options.heal else []:
        note(options.work, options.name, name, subject.heal(file_of(options.work, options.name, name)))


def measure_speed(options: argparse.Namespace) -> None:
    """Time decoding of every model as it would be shipped, each time right after the dense int8 one."""
    shipped, dense = options.work / "shipped.mgpt", options.work / "dense.mgpt"
    mgpt.save(mgpt.load(file_of(options.work, options.name, "int8")), dense)
    for name, known in results(options.work)[options.name].items():
        if "speed" in known:
            continue
        mgpt.save(storable(mgpt.load(file_of(options.work, options.name, name))), shipped)
        plain, model = (GPT2(mgpt.load(path), options.threads) for path in (dense, shipped))
        rates = [in_turns(plain, model, odd=number % 2 == 1) for number in range(ROUNDS + 1)]
        values = {
            "bytes": shipped.stat().st_size,
            "tokens_per_s": statistics.median(speed for _, speed in rates[1:]),
            "speed": statistics.median(speed / other for other, speed in rates[1:]),
        }
        note(options.work, options.name, name, values)


def in_turns(*models: GPT2, odd: bool) -> list[float]:
    """Return tokens a second of each model; in odd rounds the last comes first."""
    order = models[::-1] if odd else models
    rates = [measure.decode(model, TOKENS)[0] for model in order]
    return rates[::-1] if odd else rates


def note(work: Path, subject: str, row: str, values: dict[str, Any]) -> None:
    """Append to what is known of a row."""
    with (work / f"{subject}.jsonl").open("a") as file:
        file.write(json.dumps({"row": row, **values}) + "\n")
    print(subject, row, values, flush=True)


def results(work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read all lines, later ones completing earlier ones of the same row: {subject: {row: values}}."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(work.glob("*.jsonl")):
        rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines():
            values = json.loads(line)
            rows.setdefault(values.pop("row"), {}).update(values)
        found[path.stem] = {name: rows[name] for name in ROWS if name in rows}
    return found


def file_of(work: Path, subject: str, row: str) -> Path:
    """Return the path of what a step has left."""
    (work / subject).mkdir(parents=True, exist_ok=True)
    return work / subject / (re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-") + ".mgpt")


def write_table(options: argparse.Namespace) -> None:
    """Write docs/compression/table.md and table.json."""
    found = results(options.work)
    options.output.mkdir(parents=True, exist_ok=True)
    about = {"fitted_on": N_FIT, "chosen_by": N_HELD_OUT, "measured_on": N_TEXT, "threads": options.threads}
    text = json.dumps({"tokens": about, "machine": measure.machine(options.threads), "models": found}, indent=1)
    (options.output / "table.json").write_text(text + "\n")
    parts = [f"## {subject}\n\n{markdown(rows)}\n" for subject, rows in found.items()]
    (options.output / "table.md").write_text("\n".join(["# Every step by itself\n", *parts]))


COLUMNS = ("", "perplexity", "healed", "KL", "healed", "top-1", "healed", "bytes", "tokens/s", "of int8's")


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return one line for each row."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = [name]
        for key, form in (("ratio", "{:.3f}x"), ("kl", "{:.4f}"), ("top1", "{:.1%}")):
            cells += [form.format(values[key]) if key in values else "" for values in (row, row.get("healed", {}))]
        for key, form in (("bytes", "{:,.0f}"), ("tokens_per_s", "{:.0f}"), ("speed", "{:.2f}x")):
            cells.append(form.format(row[key]) if key in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", type=Path, default=Path("compression-work"), help="results and files so far")
    common.add_argument("--output", type=Path, default=Path("docs/compression"))
    common.add_argument("--threads", type=int, default=2)
    verbs = parser.add_subparsers(required=True)
    measuring = verbs.add_parser("measure", parents=[common])
    measuring.set_defaults(run=measure_rows)
    measuring.add_argument("name")
    for file in ("model", "calibration", "text"):
        measuring.add_argument(f"--{file}", type=Path, required=True)
    measuring.add_argument("--only", nargs="+", default=[""], help="rows whose names match these expressions, in order")
    measuring.add_argument("--no-heal", dest="heal", action="store_false")
    timing = verbs.add_parser("speed", parents=[common])
    timing.set_defaults(run=measure_speed)
    timing.add_argument("name")
    verbs.add_parser("table", parents=[common]).set_defaults(run=write_table)
    options = parser.parse_args()
    options.run(options)
    if options.run is not write_table:
        write_table(options)


if __name__ == "__main__":
    main()
