"""Text to tokens and tokens to batches.

A token file is a flat array of uint16, each document ended by <|endoftext|>. Text is JSON Lines ({"text": ...} a line,
.xz allowed) or any other file, which then counts as one document.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

END = "<|endoftext|>"


def documents(path: str | Path) -> list[str]:
    """Read the documents of a text file."""
    name = str(path)
    with (lzma.open if name.endswith(".xz") else open)(name, "rt", encoding="utf-8") as file:
        text = file.read()
    if ".jsonl" not in name:
        return [text]
    return [json.loads(line)["text"] for line in text.split("\n") if line]


def split(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """Hold out a share of the documents for validation, related ones together.

    Records that share a ``Feature:`` line, and a statement that occurs both bare and inside a record, stay on one side:
    otherwise validation would reward learning by heart.
    """

    def fields(text: str) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in text.split("\n") if ": " in line)

    def statement(text: str) -> str:
        return fields(text).get("Requirement", text)

    feature = {statement(text): fields(text)["Feature"] for text in texts if "Feature" in fields(text)}
    parts: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        key = fields(text).get("Feature") or feature.get(statement(text), statement(text))
        parts[zlib.crc32(key.encode()) < share * 2**32].append(text)
    return parts


def tokenize(texts: list[str], folder: str | Path) -> np.ndarray:
    """Encode documents with the tokenizer of a model's folder; returns uint16 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, end], np.uint16) for e in encoded])


def read(path: str | Path, folder: str | Path) -> np.ndarray:
    """Read a token file (.bin) or tokenize a text file as ``folder`` does; returns uint16 tokens."""
    return np.fromfile(path, np.uint16) if str(path).endswith(".bin") else tokenize(documents(path), folder)


def windows(tokens: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Cut tokens into windows; returns inputs and targets [n_windows, length], the last incomplete window dropped.

    Raises
    ------
    ValueError
        When the text is shorter than a window.
    """
    n = (len(tokens) - 1) // length
    if n < 1:
        raise ValueError(f"{len(tokens)} tokens are less than one window of {length} and its target; give more text")
    ids = torch.from_numpy(tokens[: n * length + 1].astype(np.int32))
    return ids[:-1].view(n, length), ids[1:].view(n, length)


def batches(tokens: np.ndarray, end: int, length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (inputs, targets) [batch, length]; every epoch joins the documents in a new order."""
    rng = np.random.default_rng(seed)
    texts = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    while True:
        x, y = windows(np.concatenate([texts[i] for i in rng.permutation(len(texts))]), length)
        order = torch.from_numpy(rng.permutation(len(x)))
        for rows in order.split(min(batch, len(x))):
            if len(rows) == min(batch, len(x)):
                yield x[rows], y[rows]
