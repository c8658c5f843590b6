"""Resistance: how far a technique can be pushed before a model gives way, one number per model, technique and measure.

Let L(r) be the log-perplexity (nats a token) with the share r removed, linear between the measured points, and L(0)
that of the untouched model. The rows of `MEASURES` are functions of the curve. Their 95 % intervals are bootstraps over
windows of text. Whether a fine-tuned model resists more than its raw parent is said in words, from these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.evaluate import interval, resampled

Doubles = NDArray[np.float64]

SURE = 0.95  # share of resamples from which a difference counts


# ---- measures: (removed [n_points], log-perplexity [n, n_points], size of the vocabulary) -> resistance [n] ----------


def removed_until(threshold: Callable[[Doubles], Doubles], removed: Doubles, curves: Doubles) -> Doubles:
    """Return the first share removed with which the log-perplexity has reached a threshold; all, if it never does."""
    rises = curves - threshold(curves[:, 0])[:, None]  # [n, n_points]
    after = np.where((rises >= 0).any(axis=1), (rises >= 0).argmax(axis=1), 0)
    rows, before = np.arange(len(curves)), np.maximum(after - 1, 0)
    gap = np.where(after > 0, rises[rows, after] - rises[rows, before], 1.0)
    crossing = removed[before] - rises[rows, before] / gap * (removed[after] - removed[before])
    return np.where(after > 0, crossing, removed[-1])


def ten_percent(removed: Doubles, curves: Doubles, vocab_size: int) -> Doubles:
    """Share removed when log-perplexity has risen by 10 %."""
    return removed_until(lambda first: 1.1 * first, removed, curves)


def tenth_of_a_nat(removed: Doubles, curves: Doubles, vocab_size: int) -> Doubles:
    """Share removed when log-perplexity has risen by 0.1 nats, perplexity by 10.5 %."""
    return removed_until(lambda first: first + 0.1, removed, curves)


def kept_area(removed: Doubles, curves: Doubles, vocab_size: int) -> Doubles:
    """Mean over the curve of what is kept: 1 as the untouched model, 0 as bad as guessing among all tokens."""
    first = curves[:, :1]
    kept = 1 - np.clip((curves - first) / (math.log(vocab_size) - first), 0, 1)  # [n, n_points]
    steps = np.diff(removed)
    area: Doubles = ((kept[:, 1:] + kept[:, :-1]) / 2 * steps).sum(axis=1) / steps.sum()
    return area


@dataclass(frozen=True)
class Measure:
    """A row of `MEASURES`: its name in words, and the function."""

    title: str
    function: Callable[[Doubles, Doubles, int], Doubles]


MEASURES = {
    "r10": Measure("removed when log-perplexity is up 10 %", ten_percent),
    "r_nat": Measure("removed when log-perplexity is up 0.1 nats", tenth_of_a_nat),
    "area": Measure("kept, mean over the curve", kept_area),
}


# ---- of curves ---------------------------------------------------------------------------------------------


def resistance(points: Sequence[Mapping[str, Any]], vocab_size: int) -> dict[str, tuple[float, Doubles]]:
    """Return each measure of a curve, and of its resamples [RESAMPLES]."""
    removed = np.array([point["removed"] for point in points])
    windows = np.array([point["windows"] for point in points], np.float64)  # [n_points, n_windows, 2]
    sums = np.stack([windows.sum(axis=1)])  # [1, n_points, 2]
    drawn = resampled(windows.transpose(1, 0, 2))  # [RESAMPLES, n_points, 2]
    return {
        name: (
            float(measure.function(removed, sums[..., 0] / sums[..., 1], vocab_size)[0]),
            measure.function(removed, drawn[..., 0] / drawn[..., 1], vocab_size),
        )
        for name, measure in MEASURES.items()
    }


def compared(curves: Mapping[str, Mapping[str, Any]], vocab_sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return one row per technique and measure: its value for each model and, for two models, who resists more.

    Parameters
    ----------
    curves : mapping
        By model, the fine-tuned one first, and technique: see `curves.degradation`.
    vocab_sizes : mapping
        By model.
    """
    found = {
        model: {name: resistance(points, vocab_sizes[model]) for name, points in techniques.items()}
        for model, techniques in curves.items()
    }
    rows = []
    for technique in next(iter(found.values())):
        for measure in MEASURES:
            each = {model: found[model][technique][measure] for model in found}
            row: dict[str, Any] = {"technique": technique, "measure": measure, "values": {}}
            for model, (value, drawn) in each.items():
                low, high = interval(drawn)
                last = curves[model][technique][-1]["removed"]
                never = measure != "area" and value >= last
                row["values"][model] = {"value": value, "low": low, "high": high, "beyond": never}
            if len(each) == 2:
                (_, tuned), (_, raw) = each.values()
                row["more"], row["less"] = float((tuned > raw).mean()), float((tuned < raw).mean())
                row["finding"] = next((word for word in ("more", "less") if row[word] >= SURE), "no clear difference")
            rows.append(row)
    return rows


CLAIMS = {  # what all measures find together
    ("more",): "holds",
    ("less",): "does not hold: it resists less",
    ("no clear difference",): "is not decided by this text",
}


def verdicts(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Say in a sentence per technique whether the claim holds that a fine-tuned model resists more.

    Parameters
    ----------
    rows : sequence of mapping
        From `compared`, for two models.
    titles : mapping
        Of the techniques.
    """
    sentences = []
    for technique, title in titles.items():
        mine = [row for row in rows if row["technique"] == technique]
        findings = tuple(sorted({row["finding"] for row in mine}))
        claim = CLAIMS.get(findings, "depends on the measure")
        details = []
        for row in mine:
            values = ", ".join(f"{model} {_said(value)}" for model, value in row["values"].items())
            details.append(f"{MEASURES[row['measure']].title}: {values} ({row['finding']})")
        sentences.append(f'With {title}, "a fine-tuned model resists more" {claim}. Share {"; ".join(details)}.')
    return sentences


def _said(value: Mapping[str, Any]) -> str:
    return f"{'> ' if value['beyond'] else ''}{value['value']:.3f}"
