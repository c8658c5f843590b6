"""The talk as a command: a model, its stages, five metrics of each, how it degrades, and whether it resists.

`make` makes the whole report, a JSON object; `page` turns one into Markdown and HTML, with `plots`. Nothing prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minigpt import measure
from minigpt.checkpoint import Checkpoint, load
from minigpt.compress import Calibration
from minigpt.evaluate import read_documents
from minigpt.report import curves, figures, resistance, stages
from minigpt.report.stages import ORIGINAL, RECIPES, Progress, Stage, prefixed
from minigpt.team import default_threads
from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes
    ----------
    tokens, context : int
        Of the text for the stages' perplexity, and inputs per window.
    curve_tokens, sensitivity_tokens, short_context : int
        The same for curves and sensitivity.
    every : int
        Curves take every so manieth value.
    generated, runs : int
        Tokens and processes of each stage's cost.
    prompts, sample_tokens : int
        Samples.
    calibration_tokens, held_out_tokens : int
        Of the calibration text, to fit on and to judge by.
    seed : int
        Of the samples.
    """

    tokens: int = 16384
    context: int = 1024
    curve_tokens: int = 3072
    sensitivity_tokens: int = 512
    short_context: int = 256
    every: int = 1
    generated: int = 128
    runs: int = 5
    prompts: int = 3
    sample_tokens: int = 64
    calibration_tokens: int = 4096
    held_out_tokens: int = 1024
    seed: int = 1


FULL = Effort()
QUICK = Effort(2048, 1024, 512, 128, 64, 3, 16, 1, 1, 16, 1024, 512)
TUNED, RAW = "fine-tuned", "raw"


def make(
    path: str,
    text: str,
    *,
    raw: str | None = None,
    raw_text: str | None = None,
    calibration: str | None = None,
    recipes: Mapping[str, stages.Recipe] = RECIPES,
    finished: Sequence[Stage] = (),
    effort: Effort = FULL,
    n_threads: int | None = None,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """Build the stages, measure them, and push both models until they give way.

    Parameters
    ----------
    path, text : str
        The fine-tuned model, and text of its task.
    raw, raw_text : str, optional
        The model that it was fine-tuned from, and text that this one is meant for.
    calibration : str, optional
        Text for the recipes that need some; without it they are left out.
    recipes : mapping of str to Recipe
    finished : sequence of Stage
        Stages that need not be built.
    effort : Effort
    n_threads : int, optional
        By default the physical cores that this process may use.
    progress : callable
        Is told what is being done.

    Raises
    ------
    MinigptError
        If a file cannot be read, a number is out of range, or a stage fails.
    """
    began = time.monotonic()
    threads = default_threads() if n_threads is None else n_threads
    texts = {TUNED: (path, read_documents(text))}
    if raw is not None and raw_text is not None:
        texts[RAW] = raw, read_documents(raw_text)
    fitted = None
    if calibration is not None:
        sizes = {"n_tokens": effort.calibration_tokens, "n_held_out": effort.held_out_tokens}
        fitted = Calibration.read(calibration, **sizes, window=min(512, load(path).config.n_positions))
    usable = {name: recipe for name, recipe in recipes.items() if fitted or not recipe.calibrated}

    with TemporaryDirectory(prefix="minigpt-report-") as folder:
        built = stages.build(load(path), usable, fitted, Path(folder), progress)
        chain = [Stage(ORIGINAL, Path(path), "as given"), *built, *finished]
        rows = measured(chain, texts[TUNED][1], effort, threads, progress)

    models = {name: load(file) for name, (file, _) in texts.items()}
    degraded, sensitive = {}, {}
    for name, model in models.items():
        tell = prefixed(name, progress)
        tokenizer, context = Tokenizer(model.vocabulary), min(effort.short_context, model.config.n_positions)
        ids = figures.encoded(model, figures.excerpt(tokenizer, texts[name][1], effort.curve_tokens))
        degraded[name] = curves.degradation(model, ids, context, effort.every, threads, tell)
        sensitive[name] = curves.sensitivity(model, ids[: effort.sensitivity_tokens + 1], context, threads, tell)
    resistances = resistance.compared(degraded, {name: model.config.vocab_size for name, model in models.items()})
    titles = {name: technique.title for name, technique in curves.TECHNIQUES.items()}
    return {
        "models": {name: described(model) for name, model in models.items()},
        "files": {"model": path, "text": text, "raw": raw, "raw_text": raw_text, "calibration": calibration},
        "stages": rows,
        "curves": degraded,
        "resistance": resistances,
        "verdicts": resistance.verdicts(resistances, titles) if len(models) == 2 else [],
        "sensitivity": sensitive,
        "left_out": [name for name in recipes if name not in usable],
        "protocol": {"effort": asdict(effort), "figures": {name: asdict(f) for name, f in figures.FIGURES.items()}},
        "machine": measure.machine(threads),
        "seconds": round(time.monotonic() - began, 1),
    }


def measured(
    chain: Sequence[Stage], documents: Sequence[str], effort: Effort, n_threads: int, progress: Progress
) -> list[dict[str, Any]]:
    """Return what there is to say of each stage: name, how it was made, figures, samples."""
    models = [described(stage.checkpoint) for stage in chain]
    positions = min(model["n_positions"] for model in models)
    n_tokens, costs = max(2, min(effort.generated, positions - 16)), []
    for stage in chain:  # before this process maps the files: pages that two processes share count half
        progress(f"cost of {stage.name}")
        costs.append(figures.cost(stage, n_threads, n_tokens, effort.runs))
    excerpt = figures.excerpt(Tokenizer(chain[0].checkpoint.vocabulary), documents, effort.tokens)
    qualities = figures.quality(chain, excerpt, min(effort.context, positions), n_threads, progress)
    prompts = figures.prompts(documents, effort.prompts)
    rows = []
    for stage, model, cost, quality in zip(chain, models, costs, qualities, strict=True):
        progress(f"samples of {stage.name}")
        texts = figures.written(stage, prompts, effort.sample_tokens, effort.seed, n_threads)
        rows.append(
            {
                "name": stage.name,
                "made": stage.made,
                "bytes": stage.path.stat().st_size,
                "model": model,
                "figures": {name: (quality | cost)[name] for name in figures.FIGURES},
                "samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)],
            }
        )
    return rows


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sizes of a model."""
    config = checkpoint.config
    return {
        "parameters": sum(
            math.prod(shape)
            for name, shape in config.shapes().items()
            if name != "lm_head.weight" or not checkpoint.tied
        ),
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_head": list(config.n_head),
        "n_inner": list(config.n_inner),
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
    }
