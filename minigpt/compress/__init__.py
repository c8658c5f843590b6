"""Compression without gradients: a pure function from checkpoint to checkpoint, made of steps.

>>> from minigpt.compress import Calibration, compress
>>> text = Calibration.read("calibration.jsonl")
>>> steps = [("vocabulary", {"size": 16384}), ("depth", {"n_layer": 5})]
>>> smaller = compress(checkpoint, steps, text, heal=True)

Each step is a row of `STEPS`. What it did is measured on the held-out half of the calibration text and written
into the history. The package is callable: `minigpt.compress(...)` is `minigpt.compress.compress(...)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from minigpt.checkpoint import Checkpoint
from minigpt.compress import factorize, prune, quantize, trim  # noqa: F401 (they fill STEPS)
from minigpt.compress.calibration import Calibration, Judge, required
from minigpt.compress.heal import Pair
from minigpt.compress.heal import heal as mend
from minigpt.compress.recipe import named
from minigpt.compress.step import STEPS

__all__ = ["STEPS", "Calibration", "compress"]


def compress(
    checkpoint: Checkpoint,
    steps: Iterable[tuple[str, Mapping[str, Any]]],
    calibration: Calibration | None = None,
    heal: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Take steps one after the other.

    Parameters
    ----------
    checkpoint : Checkpoint
        Stays as it is, and is what every result is compared with. A step that changes what a model is fed,
        tokens or positions, is taken by the reference too, so that KL and top-1 stay defined; bits per byte
        compare all.
    steps : iterable of (name, parameters)
        In order; names and parameters as in `STEPS`.
    calibration : Calibration, optional
        Text to fit on and, another part of it, to measure by. Without it only bytes are measured.
    heal : bool
        Refit in closed form after each step and keep what brings the KL down (see `heal`).
    progress : callable, optional
        Is told in a few words what is being done.

    Returns
    -------
    Checkpoint
        Its history has one more entry per step: step, parameters, and bytes, perplexity, bits_per_byte, kl,
        top1 "before", "after" and, if refits helped, "healed".

    Raises
    ------
    OptionError
        If a step or parameter is unknown or out of range, or calibration text is needed and missing or too
        short.
    """
    plan = [(named(name), parameters) for name, parameters in steps]
    for step, parameters in plan:
        step.checked(parameters)
    if heal:
        required(calibration, "healing")
    reference, layers = checkpoint, list(range(checkpoint.config.n_layer))
    judge = None if calibration is None else Judge(reference, calibration.held_out(reference))
    now = measured(checkpoint, judge)
    for number, (step, parameters) in enumerate(plan, 1):
        tell = _prefixed(f"step {number} of {len(plan)}, {step.name}", progress)
        tell("at work")
        text = None if calibration is None else replace(calibration, progress=tell)
        fed = checkpoint.config.vocab_size, checkpoint.config.n_positions
        checkpoint = step(checkpoint, text, **parameters)
        *earlier, entry = checkpoint.history
        layers = [layers[i] for i in entry.get("layers", range(len(layers)))]
        if text is not None and fed != (checkpoint.config.vocab_size, checkpoint.config.n_positions):
            reference = step(reference, text, **parameters)
            judge = Judge(reference, text.held_out(reference))
        entry |= {"before": now, "after": (now := measured(checkpoint, judge))}
        if heal and text is not None and judge is not None:
            pair = Pair(reference, layers, text.fitting(checkpoint))
            checkpoint, now, kept = mend(checkpoint, pair, judge, now, tell)
            if kept:
                now["bytes"] = checkpoint.nbytes
                entry["healed"] = {"refits": kept, **now}
        checkpoint = replace(checkpoint, history=(*earlier, entry))
    return checkpoint


def measured(checkpoint: Checkpoint, judge: Judge | None) -> dict[str, float]:
    """Return the bytes of the weights and, given a judge, what it says."""
    return {"bytes": checkpoint.nbytes, **({} if judge is None else judge.measure(checkpoint))}


def _prefixed(prefix: str, progress: Callable[[str], None] | None) -> Callable[[str], None]:
    return lambda message: None if progress is None else progress(f"{prefix}: {message}")


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Checkpoint:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
