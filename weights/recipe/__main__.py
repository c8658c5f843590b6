"""Command line of the recipe: ``python -m weights.recipe COMMAND --help``.

Every MODEL and OUT is a Hugging Face folder of a GPT-2; text is JSON Lines (.jsonl, .jsonl.xz) or tokens (.bin).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import constraints, data, model, shrink
from .sample import sample
from .train import SCHEDULES, Options, cross_entropy, evaluate, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokenize(args: argparse.Namespace) -> None:
    """Text to OUT.train.bin and OUT.valid.bin."""
    texts = [text for path in args.text for text in data.documents(path)]
    for part, chosen in zip(("train", "valid"), data.split(texts, args.valid), strict=True):
        tokens = data.tokenize(chosen, args.model)
        tokens.tofile(f"{args.out}.{part}.bin")
        print(f"{args.out}.{part}.bin: {len(chosen)} documents, {len(tokens)} tokens")


def run_merge(args: argparse.Namespace) -> None:
    """Merge a PEFT adapter into MODEL."""
    model.save(constraints.merge(model.load(args.model), args.adapter), args.out, args.model, torch.float32)


def run_cut(args: argparse.Namespace) -> None:
    """Keep the outer layers and the most important channels of MODEL."""
    model.save(shrink.cut(model.load(args.model), args.n_layer, args.n_embd), args.out, args.model, torch.float32)


def run_prune(args: argparse.Namespace) -> None:
    """Set a share of the body's weights of MODEL to zero."""
    gpt2 = model.load(args.model).to(DEVICE)
    x, _ = data.windows(data.read(args.calibration, args.model), gpt2.config["n_positions"])
    chosen = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[: args.windows]].to(DEVICE)
    model.save(shrink.prune(gpt2, args.sparsity, args.criterion, chosen), args.out, args.model, torch.float32)


def run_sample(args: argparse.Namespace) -> None:
    """Let MODEL write documents that begin like those of TEXT, until the time is over."""
    gpt2 = model.load(args.model).to(DEVICE)
    end, rng = gpt2.config["eos_token_id"], np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    tokens = np.concatenate([[end], data.read(args.text, args.model)])
    starts = np.flatnonzero(tokens[: -args.prompt] == end)
    written, began = [], time.perf_counter()
    while time.perf_counter() - began < args.seconds:
        begins = rng.choice(starts, args.batch)[:, None] + np.arange(args.prompt + 1)
        with torch.autocast(DEVICE, torch.bfloat16):
            written += sample(gpt2, torch.from_numpy(tokens[begins].astype(np.int64)).to(DEVICE), args.tokens)
    joined = np.concatenate(written)
    joined.tofile(args.out)
    print(f"{args.out}: {len(written)} documents, {len(joined)} tokens")


def run_train(args: argparse.Namespace) -> None:
    """Train MODEL; what heal adds is kept zeros and the int8 grid."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    gpt2 = model.load(args.model)
    if args.rank:
        constraints.add_lora(gpt2, args.rank, args.alpha)
    if args.keep_zeros:
        constraints.keep_zeros(gpt2)
    if args.int8:
        constraints.quantize(gpt2)
    teacher = model.load(args.teacher).to(DEVICE).requires_grad_(False) if args.teacher else None
    text = np.concatenate([data.read(path, args.model) for path in args.text])
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if value not in (args.run, math.inf)}
    with open(Path(args.out) / "training.jsonl", "w", encoding="utf-8") as log:
        log.write(json.dumps(settings) + "\n")
        best = train(gpt2.to(DEVICE), text, data.read(args.valid, args.model), options, log, teacher)
    print(json.dumps(best))
    if args.rank:
        constraints.save_adapter(gpt2, args.out)
    else:
        # bfloat16 cannot hold the int8 grid
        model.save(constraints.bake(gpt2), args.out, args.model, torch.float32 if args.int8 else torch.bfloat16)


def run_evaluate(args: argparse.Namespace) -> None:
    """Perplexity in float32 over non-overlapping windows."""
    gpt2 = model.load(args.model).to(DEVICE)
    torch.set_float32_matmul_precision("highest")
    for path in args.text:
        tokens, length = data.read(path, args.model), gpt2.config["n_positions"]
        nll = evaluate(partial(cross_entropy, gpt2), tokens, length, gpt2.wte.weight.device)
        line = {"model": args.model, "text": Path(path).name, "nll": nll, "ppl": math.exp(nll)}
        print(json.dumps(line | {"tokens": (len(tokens) - 1) // length * length}))


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    top = argparse.ArgumentParser(prog="python -m weights.recipe", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], *, out: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("model", metavar="MODEL")
        if out:
            sub.add_argument("out", metavar="OUT")
        return sub

    sub = command("tokenize", tokenize)
    sub.add_argument("text", nargs="+")
    sub.add_argument("--valid", type=float, default=0.02, help="share of the documents held out")
    sub = command("merge", run_merge)
    sub.add_argument("adapter")
    sub = command("cut", run_cut)
    sub.add_argument("--n-layer", type=int, default=6)
    sub.add_argument("--n-embd", type=int, default=384)
    sub = command("prune", run_prune)
    sub.add_argument("calibration", help="training text")
    sub.add_argument("--sparsity", type=float, default=0.4)
    sub.add_argument("--criterion", choices=shrink.CRITERIA, default="wanda")
    sub.add_argument("--windows", type=int, default=128)
    sub = command("sample", run_sample)
    sub.add_argument("text", help="what the first tokens of each document are taken from")
    sub.add_argument("--prompt", type=int, default=2, help="tokens taken from a document")
    sub.add_argument("--tokens", type=int, default=192, help="tokens written at most")
    sub.add_argument("--batch", type=int, default=4096)
    sub.add_argument("--seconds", type=float, default=60)
    sub.add_argument("--seed", type=int, default=1)
    for name in ("finetune", "heal"):
        sub = command(name, run_train)
        sub.add_argument("text", nargs="+")
        sub.add_argument("--valid", required=True, help="text held out of the training text, to stop by")
        sub.add_argument("--teacher", metavar="MODEL", help="distil from this model")
        sub.add_argument("--rank", type=int, default=0, help="train a LoRA adapter of this rank instead")
        sub.add_argument("--alpha", type=float, default=64, help="LoRA's scale times its rank")
        heal = name == "heal"
        sub.add_argument("--keep-zeros", action=argparse.BooleanOptionalAction, default=heal, help="masks")
        sub.add_argument("--int8", action=argparse.BooleanOptionalAction, default=heal, help="fake quantization")
        for field in fields(Options):
            flag, default = "--" + field.name.replace("_", "-"), getattr(Options, field.name, None)
            if field.name == "schedule":
                sub.add_argument(flag, choices=SCHEDULES, default=default)
            elif field.name == "compile":
                sub.add_argument(flag, action=argparse.BooleanOptionalAction, default=DEVICE == "cuda")
            else:
                sub.add_argument(
                    flag, type=int if default is None else type(default), default=default, required=default is None
                )
    sub = command("evaluate", run_evaluate, out=False)
    sub.add_argument("text", nargs="+")
    return top


if __name__ == "__main__":
    args = parser().parse_args(sys.argv[1:])
    args.run(args)
