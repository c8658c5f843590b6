"""How often engines choose the token that float32 chooses, on a real model: what the speed of integers costs.

    python benchmarks/agreement.py FILE.mgpt TEXT [--size m1] [--prompts 300] [--tokens 128] [--engines ...]

FILE is in f32 and of the shape `--size`. Each engine gets its own file made from it, reads the same pieces of the text
as prompts, and says what comes next. The share of a choice among n is off by sqrt(share (1 - share) / n) as a rule.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import models
import numpy as np
from engines import ENGINES, KINDS, OURS

from minigpt import checkpoint as mgpt
from minigpt.compress import STEPS
from minigpt.converters.export import export
from minigpt.evaluate import encode_documents, read_documents
from minigpt.tokenizer import Tokenizer

PEERS = ("onnxruntime-int8", "ctranslate2-int8", "llama.cpp-q8_0", "onnxruntime-4bit", "llama.cpp-q4_0")


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--size", choices=models.SIZES, default="m1")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt")
    parser.add_argument("--engines", nargs="+", default=[OURS["int8"], OURS["int4"], *PEERS])
    options = parser.parse_args()
    checkpoint = mgpt.load(options.file)
    ids = encode_documents(
        Tokenizer(checkpoint.vocabulary), read_documents(options.text), checkpoint.config.eos_token_id
    )
    prompts = [ids[i : i + options.tokens].tolist() for i in range(0, len(ids) - options.tokens, options.tokens)]
    prompts = prompts[: options.prompts]
    with tempfile.TemporaryDirectory() as folder:
        models.FOLDER = Path(folder)
        export(checkpoint, models.FOLDER / f"{options.size}-huggingface")
        for kind in KINDS:  # each of them: a missing file would be made of random weights
            ours = models.FOLDER / f"{options.size}-{kind}.mgpt"
            mgpt.save(STEPS["quantize"](checkpoint, encoding=kind), ours)
        print(f"| {len(prompts)} prompts of {options.tokens} tokens | the same token | error |\n|---|---|---|")
        expected = choices(OURS["f32"], options.size, prompts)
        for name in options.engines:
            share = float((choices(name, options.size, prompts) == expected).mean())
            error = math.sqrt(share * (1 - share) / len(prompts))
            print(f"| {name} | {share:.1%} | {error:.1%} |", flush=True)


def choices(name: str, size: str, prompts: list[list[int]]) -> np.ndarray:
    """Return the token that an engine chooses after each prompt."""
    engine = ENGINES[name](ENGINES[name].prepare(size), models.SIZES[size], 2)
    return np.array([engine.generate(prompt, 1)[1][0] for prompt in prompts])


if __name__ == "__main__":
    main()
