"""What is measured of each stage: `FIGURES` says in which unit and how, the functions below measure.

A value is {"value", "low", "high"}, or {"absent": why}. Low and high are the lowest and highest of several runs, of a
perplexity or bits per byte the 95 % confidence interval; what cannot vary has equal ones. Comparing is done elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minigpt import measure
from minigpt.api import MiniGPT
from minigpt.checkpoint import Checkpoint, Vocabulary
from minigpt.evaluate import Evaluation, Ids, encode_documents, evaluate_together
from minigpt.measure import Spread
from minigpt.model import GPT2
from minigpt.report.stages import Progress, Stage, prefixed
from minigpt.tokenizer import Tokenizer

Value = dict[str, Any]

PASSAGE = 2000  # characters: longer documents count as several
PROMPT_WORDS = 12


@dataclass(frozen=True)
class Figure:
    """A row of `FIGURES`.

    Attributes
    ----------
    title, unit : str
    digits : int
        After the decimal point, in tables.
    protocol : str
        How it is measured.
    """

    title: str
    unit: str
    digits: int
    protocol: str


PROCESS = "a fresh process, a prompt of at most 16 tokens, then greedy tokens; median, lowest and highest of the runs"

FIGURES = {
    "perplexity": Figure(
        "perplexity",
        "per token of the original",
        2,
        "exp(nats per byte x bytes per token of the original): with the original's vocabulary exp of the mean negative "
        "log-likelihood of a token; 95 % bootstrap over windows",
    ),
    "bits_per_byte": Figure("bits per byte", "bit", 4, "negative log-likelihood over bytes of text; 95 % bootstrap"),
    "kl": Figure("KL divergence", "nat/token", 4, "mean KL(original || stage) of the next token, same vocabulary only"),
    "top1": Figure("top-1 agreement", "", 3, "share of tokens whose likeliest successor is the original's"),
    "token_cpu_ms": Figure("CPU time per token", "ms", 2, f"all threads; {PROCESS}"),
    "utilisation": Figure("CPU use", "processors", 2, f"busy on average while generating; {PROCESS}"),
    "joules_per_token": Figure(
        "energy per token", "J", 4, f"RAPL counters of all packages at start and end; {PROCESS}"
    ),
    "peak_rss_mb": Figure("peak memory", "MB", 1, f"largest resident set, the mapped file counted; {PROCESS}"),
    "pss_mb": Figure("proportional memory", "MB", 1, f"shared pages count as their share, at the end; {PROCESS}"),
    "mapped_mb": Figure("of which the mapped file", "MB", 1, "pages of the model file in the proportional set"),
    "ttft_s": Figure(
        "time to first token", "s", 3, f"from starting the process, imports and loading included; {PROCESS}"
    ),
    "token_ms_p50": Figure("time per token, p50", "ms", 2, f"median of a run's tokens after the first; {PROCESS}"),
    "token_ms_p95": Figure("time per token, p95", "ms", 2, f"95th percentile of a run's tokens; {PROCESS}"),
    "file_mb": Figure("file size", "MB", 2, "bytes on disk / 10^6"),
}
FIVE = ("perplexity", "token_cpu_ms", "peak_rss_mb", "token_ms_p50", "file_mb")  # the talk's five metrics


def exactly(value: float) -> Value:
    """Return a value that cannot vary."""
    return {"value": value, "low": value, "high": value}


def absent(why: str) -> Value:
    """Return what stands for a value that does not exist."""
    return {"absent": why}


# ---- text --------------------------------------------------------------------------------------------------


def excerpt(tokenizer: Tokenizer, documents: Sequence[str], n_tokens: int) -> list[str]:
    """Return all documents or, of a longer text, passages spread evenly over it that have about n_tokens in all."""
    total = sum(len(tokenizer.encode(text)) + 1 for text in documents)
    if total <= n_tokens:
        return list(documents)
    whole_words = re.compile(rf"(?s).{{1,{PASSAGE}}}(?=\s|$)")
    passages = [passage for text in documents for passage in whole_words.findall(text)]
    wanted = max(1, round(len(passages) * n_tokens / total))
    return [passages[i] for i in np.linspace(0, len(passages) - 1, wanted).round().astype(int)]


def encoded(checkpoint: Checkpoint, documents: Sequence[str]) -> Ids:
    """Encode documents, each with the end-of-text token: [n_tokens]."""
    return encode_documents(Tokenizer(checkpoint.vocabulary), list(documents), checkpoint.config.eos_token_id)


# ---- quality -----------------------------------------------------------------------------------------------


def quality(
    stages: Sequence[Stage], documents: Sequence[str], context: int, n_threads: int | None, progress: Progress
) -> list[dict[str, Value]]:
    """Measure how well each stage predicts the documents; the first stage is the original.

    Stages of its vocabulary run side by side with it, window by window.
    """
    checkpoints = [stage.checkpoint for stage in stages]
    alike = [i for i, c in enumerate(checkpoints) if same(c.vocabulary, checkpoints[0].vocabulary)]
    found: dict[int, dict[str, Value]] = {}
    for group in [alike, *([i] for i in range(len(stages)) if i not in alike)]:
        tell = prefixed(f"perplexity of {', '.join(stages[i].name for i in group)}", progress)
        models = [GPT2(checkpoints[i], n_threads) for i in group]
        results = evaluate_together(
            models,
            encoded(checkpoints[group[0]], documents),
            checkpoints[group[0]].vocabulary,
            context=context,
            reference=models[0] if group is alike else None,
            progress=tell,
        )
        if group is alike:
            _, n_targets, n_bytes = results[0].windows.sum(axis=0)
        found |= {
            i: predicted(result) if group is alike else rescaled(result, n_bytes / n_targets)
            for i, result in zip(group, results, strict=True)
        }
    return [found[i] for i in range(len(stages))]


def same(a: Vocabulary, b: Vocabulary) -> bool:
    """Return whether two vocabularies encode alike."""
    return a.special_tokens == b.special_tokens and all(
        np.array_equal(getattr(a, part), getattr(b, part)) for part in ("token_bytes", "token_ends", "merges")
    )


def predicted(result: Evaluation) -> dict[str, Value]:
    """Return the values of a stage with the original's vocabulary."""
    assert result.kl is not None
    assert result.top1 is not None
    return {
        "perplexity": _bounded(result.perplexity, result.perplexity_low, result.perplexity_high),
        "bits_per_byte": _bounded(result.bits_per_byte, result.bits_per_byte_low, result.bits_per_byte_high),
        "kl": exactly(result.kl),
        "top1": exactly(result.top1),
    }


def rescaled(result: Evaluation, bytes_per_token: float) -> dict[str, Value]:
    """Return those of another vocabulary, its perplexity for tokens of the original's mean length."""
    bits = _bounded(result.bits_per_byte, result.bits_per_byte_low, result.bits_per_byte_high)
    nats = {bound: value * math.log(2) * bytes_per_token for bound, value in bits.items() if bound != "absent"}
    return {
        "perplexity": {bound: math.exp(min(value, 700.0)) for bound, value in nats.items()} or bits,
        "bits_per_byte": bits,
        "kl": absent("another vocabulary"),
        "top1": absent("another vocabulary"),
    }


def _bounded(value: float | None, low: float | None, high: float | None) -> Value:
    if value is None:
        return absent("the text has no bytes")
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


# ---- cost --------------------------------------------------------------------------------------------------


def cost(stage: Stage, n_threads: int, n_tokens: int, runs: int) -> dict[str, Value]:
    """Measure what a stage costs in processes of its own.

    Raises
    ------
    MinigptError
        If such a process fails.
    """
    started = measure.start(stage.path, n_threads=n_threads, n_tokens=n_tokens, runs=runs)
    why = {
        "joules_per_token": f"no readable counters in {measure.POWERCAP}",
        "pss_mb": "no /proc/PID/smaps here",
        "mapped_mb": "no /proc/PID/smaps here",
    }
    found = {}
    for name in FIGURES:
        if hasattr(started, name):
            spread: Spread | None = getattr(started, name)
            found[name] = (
                absent(why[name])
                if spread is None
                else {"value": spread.median, "low": spread.minimum, "high": spread.maximum}
            )
    return found | {"file_mb": exactly(stage.path.stat().st_size / 1e6)}


# ---- samples -----------------------------------------------------------------------------------------------


def prompts(documents: Sequence[str], n: int) -> list[str]:
    """Return how some documents, spread over the text, begin."""
    worded = [text for text in documents if len(text.split()) > PROMPT_WORDS] or [t for t in documents if t.strip()]
    places = {round(len(worded) * (i + 0.5) / n - 0.5) for i in range(n)} if worded else set()
    chosen = [worded[i] for i in sorted(places)]
    begin = re.compile(rf"\s*(?:\S+\s+){{0,{PROMPT_WORDS - 1}}}\S+")
    return [match[0] for text in chosen if (match := begin.match(text))]


def written(stage: Stage, prompts: Sequence[str], n_tokens: int, seed: int, n_threads: int) -> list[str]:
    """Return how a stage goes on after each prompt."""
    with MiniGPT(stage.checkpoint, n_threads) as model:
        return [model.complete(p, max_tokens=n_tokens, seed=seed)[0].text for p in prompts]
