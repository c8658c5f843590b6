"""The training loop: text or a teacher, any constraints on the weights, early stop on held-out text.

Muon moves the matrices of the body, AdamW the tables, gains, biases and adapters.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import batches, windows
from .model import GPT2

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}


@dataclass(frozen=True)
class Options:
    """How long and how hard to train."""

    steps: int
    minutes: float = math.inf  # whichever ends first; compiling does not count
    batch: int = 64  # windows of n_positions tokens a step
    micro: int = 64  # windows at once, as memory allows
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    warmup: int = 50  # steps
    schedule: str = "linear"
    temperature: float = 1.0
    distill_weight: float = 1.0  # 0: the text alone, 1: the teacher alone
    eval_every: int = 100  # steps
    patience: int = 10  # evaluations without a gain before stopping
    seed: int = 1
    compile: bool = False


def cross_entropy(student: GPT2, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats a token."""
    return F.cross_entropy(student(ids).float().flatten(0, 1), targets.flatten().long())


def distillation(
    student: GPT2, ids: Tensor, targets: Tensor, taught: Tensor, weight: float, temperature: float
) -> Tensor:
    """Mix text and teacher, whose logits are ``taught``, in nats a token. Source: Hinton et al. 2015."""
    logits = student(ids).float().flatten(0, 1)  # [n_tokens, vocab_size]
    wanted = F.log_softmax(taught.float().flatten(0, 1) / temperature, -1)
    written = F.log_softmax(logits / temperature, -1)
    soft = temperature**2 * F.kl_div(written, wanted, log_target=True, reduction="batchmean")
    return (1 - weight) * F.cross_entropy(logits, targets.flatten().long()) + weight * soft


Measure = Callable[[Tensor, Tensor], Tensor]  # ids and targets [n_windows, n_tokens] -> mean in nats a token


@torch.no_grad()
def evaluate(measure: Measure, tokens: np.ndarray, length: int, device: torch.device, batch: int = 8) -> float:
    """Mean of ``measure`` over non-overlapping windows of ``length`` tokens."""
    x, y = (t.to(device) for t in windows(tokens, length))
    pairs = zip(x.split(batch), y.split(batch), strict=True)
    return sum(measure(ids, targets).item() * len(ids) for ids, targets in pairs) / len(x)


def optimizers(model: GPT2, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the body's full matrices, AdamW for all else that trains."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    body = [p for name, p in trainable.items() if p.ndim == 2 and name.startswith("h.") and "lora" not in name]
    rest = [p for p in trainable.values() if not any(p is q for q in body)]
    adam = torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [adam, torch.optim.Muon(body, lr=options.muon_lr, weight_decay=0.01)] if body else [adam]


def train(
    model: GPT2, text: np.ndarray, held_out: np.ndarray, options: Options, log: TextIO, teacher: GPT2 | None = None
) -> dict:
    """Train ``model`` in place and leave it at its best evaluation on held-out text.

    Parameters
    ----------
    model : GPT2
        On its device, constraints already registered.
    text, held_out : array of uint16
        Tokens to train on and to stop by.
    options : Options
    log : text file
        Receives a JSON line for each evaluation.
    teacher : GPT2, optional
        On the same device, with the same vocabulary and positions.

    Returns
    -------
    dict
        The best evaluation's line: step, tokens, seconds, and the loss trained with (nats a token) on the last batch
        and on the held-out text.
    """
    device, length = model.wte.weight.device, model.config["n_positions"]
    compiled = torch.compile if options.compile else lambda function: function
    read_text, follow = compiled(cross_entropy), compiled(distillation)
    teach = None if teacher is None else compiled(teacher)

    def objective(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if teach is None:
                return read_text(model, ids, targets)
            with torch.no_grad():
                taught = teach(ids)
            return follow(model, ids, targets, taught, options.distill_weight, options.temperature)

    opts = optimizers(model, options)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    feed = batches(text, model.config["eos_token_id"], length, options.batch, options.seed)
    best: dict = {"held_out": math.inf}
    best_state, step, progress, began = {}, 0, 0.0, time.perf_counter()
    while progress < 1:
        factor = min(1.0, (step + 1) / options.warmup) * SCHEDULES[options.schedule](progress)
        for opt, peak in zip(opts, peaks, strict=True):
            for group, lr in zip(opt.param_groups, peak, strict=True):
                group["lr"] = lr * factor
        x, y = (t.to(device) for t in next(feed))
        mean = torch.zeros((), device=device)
        for ids, targets in zip(x.split(options.micro), y.split(options.micro), strict=True):
            part = objective(ids, targets) * (len(ids) / len(x))
            part.backward()
            mean += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        if step == 1:  # compiled by now
            began = time.perf_counter()
        seconds = time.perf_counter() - began
        progress = max(step / options.steps, seconds / 60 / options.minutes)
        if step % options.eval_every and progress < 1:
            continue
        with torch.compiler.set_stance("force_eager"):  # not worth compiling again without gradients
            nats = evaluate(objective, held_out, length, device)
        if not math.isfinite(nats):
            raise FloatingPointError(f"loss {nats} at step {step}; lower --muon-lr and --adam-lr")
        line = {"step": step, "tokens": step * x.numel(), "seconds": round(seconds, 1)}
        line |= {"loss": mean.item(), "held_out": nats}
        log.write(json.dumps(line) + "\n")
        log.flush()
        if line["held_out"] < best["held_out"]:
            best, best_state = line, {name: t.detach().clone() for name, t in model.state_dict().items()}
        elif step - best["step"] >= options.patience * options.eval_every:
            break
    model.load_state_dict(best_state)
    return best
