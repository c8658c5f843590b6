"""A tiny model made from a seed, and the folder of real models where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from minigpt.checkpoint import Checkpoint, Config, Vocabulary, encoding_for, save
from minigpt.encodings import encode

MERGES = [
    (b"t", b"h"),
    (b"th", b"e"),
    (b" ", b"the"),
    (b"i", b"n"),
    (b"in", b"g"),
    (b"e", b"r"),
    (b"o", b"n"),
    (b" ", b"s"),
]
END_OF_TEXT = "<|endoftext|>"


def small_vocabulary() -> Vocabulary:
    """All bytes, a few merges and the end-of-text token."""
    tokens = [bytes([b]) for b in range(256)]
    merges = []
    for left, right in MERGES:
        merges.append((tokens.index(left), tokens.index(right)))
        tokens.append(left + right)
    tokens.append(END_OF_TEXT.encode())
    return Vocabulary(
        np.frombuffer(b"".join(tokens), np.uint8),
        np.cumsum([len(t) for t in tokens]).astype(np.uint32),
        np.array(merges, np.uint32),
        {END_OF_TEXT: len(tokens) - 1},
    )


def small_checkpoint(encoding: str = "f32", seed: int = 0, tied: bool = True, **changes) -> Checkpoint:
    """Two layers of random weights, uneven on purpose, whose logits are far from uniform."""
    vocabulary = small_vocabulary()
    shape = {
        "vocab_size": len(vocabulary),
        "n_positions": 64,
        "n_embd": 48,
        "n_layer": 2,
        "head_dim": 16,
        "n_head": (3, 2),
        "n_inner": (192, 100),
        "attn_scale": (0.25, 0.25),
        "eos_token_id": len(vocabulary) - 1,
    }
    config = Config(**(shape | changes))
    rng = np.random.default_rng(seed)
    weights = {}
    for name, size in config.shapes().items():
        if name == "lm_head.weight" and tied:
            weights[name] = weights["wte.weight"]
            continue
        values = rng.normal(0, 0.3, size)
        if len(size) == 1 and name.endswith("weight"):
            values += 1
        weights[name] = encode(values, encoding_for(name, encoding))
    return Checkpoint(config, vocabulary, weights)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return small_checkpoint()


@pytest.fixture
def model_file(tmp_path, checkpoint) -> Path:
    path = tmp_path / "small.mgpt"
    save(checkpoint, path)
    return path


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder named by MINIGPT_TEST_MODELS: tech-gpt2-124m, requirements-lora, requirements-6x384."""
    folder = os.environ.get("MINIGPT_TEST_MODELS")
    if not folder or not Path(folder, "requirements-6x384").is_dir():
        pytest.skip("MINIGPT_TEST_MODELS names no folder of real models")
    return Path(folder)
