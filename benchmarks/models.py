"""Models with random weights in the shapes that are compared, made when first asked for: speed depends on shapes only.

Whatever is made lies in one folder, `benchmarks/.models` or the one that MINIGPT_BENCH_MODELS names, and is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(os.environ.get("MINIGPT_BENCH_MODELS") or Path(__file__).parent / ".models")


class Size(NamedTuple):
    """The shape of a GPT-2 with heads of 64."""

    n_layer: int
    n_head: int
    vocab_size: int = 50257
    n_positions: int = 1024

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return 64 * self.n_head


SIZES = {
    "m1": Size(12, 12),  # GPT-2 124M
    "m2": Size(6, 6),  # the shape of the embedded model
    "tiny": Size(2, 2, 2000),  # to try the benchmarks themselves
}


def checkpoint(size: str, encoding: str = "f32"):
    """Return a Checkpoint of normally distributed weights, the same for every encoding but for rounding."""
    import numpy as np

    from minigpt.checkpoint import Checkpoint, Config, encoding_for
    from minigpt.encodings import encode

    n_layer, n_head, vocab_size, n_positions = SIZES[size]
    n_embd = SIZES[size].n_embd
    config = Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        head_dim=64,
        n_head=(n_head,) * n_layer,
        n_inner=(4 * n_embd,) * n_layer,
        attn_scale=(0.125,) * n_layer,
        eos_token_id=vocab_size - 1,
    )
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in config.shapes().items():
        if name == "lm_head.weight":
            weights[name] = weights["wte.weight"]
            continue
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        gain = ".ln_" in name or name.startswith("ln_f.")
        weights[name] = encode(values + 1 if gain and name.endswith("weight") else values, encoding_for(name, encoding))
    return Checkpoint(config, vocabulary(vocab_size), weights)


def vocabulary(size: int):
    """Return a byte-level BPE vocabulary: 256 bytes, pairs of them in order, and the end-of-text token."""
    import numpy as np

    from minigpt.checkpoint import Vocabulary

    merges = np.array([divmod(i, 256) for i in range(size - 257)], np.uint32)  # [n_merges, 2]
    lengths = np.repeat([1, 2, len(END_OF_TEXT)], [256, len(merges), 1])
    token_bytes = bytes(range(256)) + merges.astype(np.uint8).tobytes() + END_OF_TEXT
    ends = np.cumsum(lengths).astype(np.uint32)
    return Vocabulary(np.frombuffer(token_bytes, np.uint8), ends, merges, {END_OF_TEXT.decode(): size - 1})


END_OF_TEXT = b"<|endoftext|>"


def model_file(size: str, encoding: str) -> Path:
    """Return the `.mgpt` file of a size in an encoding."""
    from minigpt.checkpoint import save

    return made(f"{size}-{encoding}.mgpt", lambda path: save(checkpoint(size, encoding), path))


def huggingface_folder(size: str) -> Path:
    """Return the same weights as a Hugging Face folder, from which other engines' files are made."""
    from minigpt.converters.export import export

    return made(f"{size}-huggingface", lambda path: export(checkpoint(size), path))


def made(name: str, make: Callable[[Path], object]) -> Path:
    """Return FOLDER / name, made under another name first so that it is there as a whole or not at all."""
    path = FOLDER / name
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        unfinished = path.with_name(f"unfinished-{os.getpid()}-{name}")
        make(unfinished)
        unfinished.rename(path)
    return path
