"""How a model degrades under one technique pushed ever further, and which part of which layer is sensitive.

Each technique is a row of `TECHNIQUES`, in its plain form: no calibration text, no healing. Perplexity only; what a
curve says about resistance is computed in `resistance.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Checkpoint, Config
from minigpt.compress import STEPS
from minigpt.compress.calibration import LINEARS
from minigpt.compress.step import updated
from minigpt.evaluate import Evaluation, Ids, evaluate, evaluate_together
from minigpt.model import GPT2
from minigpt.report.stages import SPARSITY, Progress

Floats = NDArray[np.float32]

GROUP = 32  # columns with one scale and one minimum of 16 bits each: a bit more for each weight
BITS_BEFORE = 32


# ---- techniques --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Technique:
    """A row of `TECHNIQUES`.

    Attributes
    ----------
    title, axis : str
        Of its curve.
    label : str
        Format of a value.
    untouched : callable
        Configuration -> the value that stands for no change.
    values : callable
        Configuration -> how far the technique is pushed, mildest first.
    apply : callable
        Checkpoint and value -> checkpoint.
    removed : callable
        Configuration and value -> share of zeros, layers or bits that is gone.
    """

    title: str
    axis: str
    label: str
    untouched: Callable[[Config], float]
    values: Callable[[Config], list[float]]
    apply: Callable[[Checkpoint, float], Checkpoint]
    removed: Callable[[Config, float], float]


def sparser(checkpoint: Checkpoint, sparsity: float) -> Checkpoint:
    """Set a share of each matrix of the blocks to zero, the smallest weights."""
    return STEPS["prune"](checkpoint, sparsity=sparsity, criterion="magnitude")


def shallower(checkpoint: Checkpoint, n_layer: float) -> Checkpoint:
    """Take layers out of the centre."""
    return STEPS["depth"](checkpoint, n_layer=int(n_layer))


def coarser(checkpoint: Checkpoint, bits: float) -> Checkpoint:
    """Round the matrices of the blocks to 2 ** bits levels between the ends of each group of 32 columns."""
    names = [f"h.{i}.{linear}.weight" for i in range(checkpoint.config.n_layer) for linear in LINEARS]
    return updated(checkpoint, {name: to_bits(checkpoint.weights[name].decode(), int(bits)) for name in names})


def to_bits(w: Floats, bits: int) -> Floats:
    """Round to nearest, as the encoding int4 does with 4 bits, but with exact scales."""
    groups = np.pad(w, ((0, 0), (0, -w.shape[1] % GROUP)), mode="edge").reshape(len(w), -1, GROUP)
    low = groups.min(axis=2, keepdims=True)
    step = np.maximum(groups.max(axis=2, keepdims=True) - low, np.float32(1e-30)) / np.float32(2**bits - 1)
    rounded: Floats = np.rint((groups - low) / step) * step + low
    return rounded.reshape(len(w), -1)[:, : w.shape[1]]


def fewer_layers(config: Config) -> list[float]:
    """Return depths down to a third, each layer up to half of them."""
    n = config.n_layer
    return [float(k) for k in sorted({*range(max(1, n // 2), n), max(1, n // 3)}, reverse=True)]


TECHNIQUES = {
    "sparsity": Technique(
        "growing sparsity",
        "zeros among the blocks' weights",
        "{:.0%}",
        lambda config: 0.0,
        lambda config: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8],
        sparser,
        lambda config, sparsity: sparsity,
    ),
    "depth": Technique(
        "fewer layers",
        "layers left",
        "{:g}",
        lambda config: config.n_layer,
        fewer_layers,
        shallower,
        lambda config, n_layer: 1 - n_layer / config.n_layer,
    ),
    "bits": Technique(
        "fewer bits",
        "bits of the blocks' weights",
        "{:g}",
        lambda config: BITS_BEFORE,
        lambda config: [8, 6, 5, 4, 3, 2],
        coarser,
        lambda config, bits: 1 - (bits + 1) / BITS_BEFORE,
    ),
}


def degradation(
    checkpoint: Checkpoint, ids: Ids, context: int, every: int, n_threads: int | None, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Measure a model under each technique.

    Parameters
    ----------
    ids : ndarray of shape (n_tokens,), dtype=int64
        The text.
    context : int
        Inputs per window.
    every : int
        Take every so manieth value, the last one in any case.

    Returns
    -------
    dict of str to list of dict
        By technique, points from the untouched model on: value, removed, perplexity, and the negative log-likelihood
        (nats) and number of targets of each window.
    """

    def point(value: float, removed: float, changed: Checkpoint) -> dict[str, Any]:
        result = evaluate(GPT2(changed, n_threads), ids, checkpoint.vocabulary, context=context)
        windows = [[round(nll, 4), int(n)] for nll, n, _ in result.windows]
        return {"value": value, "removed": removed, "perplexity": result.perplexity, "windows": windows}

    progress("untouched")
    first, curves = point(0.0, 0.0, checkpoint), {}
    for name, technique in TECHNIQUES.items():
        curves[name] = [first | {"value": technique.untouched(checkpoint.config)}]
        for value in technique.values(checkpoint.config)[::-every][::-1]:
            progress(f"{technique.title}: {value:g}")
            removed = technique.removed(checkpoint.config, value)
            curves[name].append(point(value, removed, technique.apply(checkpoint, value)))
    return curves


# ---- sensitivity -------------------------------------------------------------------------------------------


def silenced(checkpoint: Checkpoint, i: int) -> Checkpoint:
    """Let layer i write nothing, as if it were not there."""
    names = [f"h.{i}.{linear}.{part}" for linear in LINEARS[1::2] for part in ("weight", "bias")]
    return updated(checkpoint, {name: np.zeros(checkpoint.weights[name].shape, np.float32) for name in names})


def thinned(checkpoint: Checkpoint, i: int, linear: str) -> Checkpoint:
    """Prune one matrix of layer i by magnitude."""
    return STEPS["prune"](checkpoint, sparsity=SPARSITY, criterion="magnitude", only=f"h.{i}.{linear}.weight")


DAMAGES: dict[str, Callable[[Checkpoint, int], Checkpoint]] = {
    "whole layer removed": silenced,
    **{f"{linear} pruned {SPARSITY:.0%}": partial(thinned, linear=linear) for linear in LINEARS},
}


def sensitivity(
    checkpoint: Checkpoint, ids: Ids, context: int, n_threads: int | None, progress: Progress
) -> dict[str, list[float]]:
    """Return, for each damage, the KL (nats a token) from the untouched model that it does in each layer."""
    reference, found = GPT2(checkpoint, n_threads), []
    for i in range(checkpoint.config.n_layer):
        progress(f"sensitivity: layer {i + 1} of {checkpoint.config.n_layer}")
        models = [GPT2(damage(checkpoint, i), n_threads) for damage in DAMAGES.values()]
        results: list[Evaluation] = evaluate_together(
            models, ids, checkpoint.vocabulary, context=context, reference=reference
        )
        found.append([result.kl or 0.0 for result in results])
    return {name: [kl[row] for kl in found] for row, name in enumerate(DAMAGES)}
