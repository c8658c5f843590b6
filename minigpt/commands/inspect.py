"""`minigpt inspect`: what is in a file, without reading the weights."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from minigpt.checkpoint import Checkpoint
from minigpt.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser, positional=True)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Print configuration, tensors and history."""
    path = common.model_path(options.model)
    report = describe(common.open_model(options.model), os.path.getsize(path))
    if options.json:
        print(json.dumps(report))
        return
    print(f"{common.printable(str(path))}: {report['bytes']:,} bytes, {report['parameters']:,} parameters\n")
    common.print_table((name, _short(value)) for name, value in report["config"].items())
    print()
    common.print_table(
        (
            t["name"],
            t["encoding"],
            " x ".join(map(str, t["shape"])),
            f"{t['bytes']:,}",
            f"{t['bits_per_weight']:.2f}",
        )
        for t in report["tensors"]
    )
    for number, entry in enumerate(report["history"], 1):
        print(f"\n{number}. {common.printable(json.dumps(entry, ensure_ascii=False))}")


def describe(checkpoint: Checkpoint, n_bytes: int) -> dict[str, Any]:
    """Return the report as JSON values; a tied head is not listed again."""
    tensors = []
    for name in checkpoint.config.shapes():
        if name == "lm_head.weight" and checkpoint.tied:
            continue
        weight = checkpoint.weights[name]
        size = int(weight.shape[0] if len(weight.shape) == 1 else weight.shape[0] * weight.shape[1])
        tensors.append(
            {
                "name": name,
                "encoding": weight.encoding.name,
                "shape": list(weight.shape),
                "bytes": weight.nbytes,
                "bits_per_weight": 8 * weight.nbytes / size,
                "parameters": size,
            }
        )
    return {
        "bytes": n_bytes,
        "parameters": sum(t["parameters"] for t in tensors),
        "config": checkpoint.config.to_json(),
        "tied_head": checkpoint.tied,
        "vocabulary": {
            "tokens": len(checkpoint.vocabulary),
            "merges": len(checkpoint.vocabulary.merges),
            "special_tokens": checkpoint.vocabulary.special_tokens,
        },
        "tensors": tensors,
        "history": list(checkpoint.history),
    }


def _short(value: Any) -> str:
    """Write a per-layer tuple of equal values as one."""
    if isinstance(value, (list, tuple)):
        return f"{value[0]:g} in each layer" if len(set(value)) == 1 else ", ".join(f"{v:g}" for v in value)
    return str(value)
