"""What all converters share: the `Source` that a reader returns, and how it becomes a verified file.

A reader knows one foreign layout and nothing of encodings or `.mgpt`; this module knows no foreign layout.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Checkpoint, Config, Vocabulary, encoding_for, load, save
from minigpt.encodings import ENCODINGS, Weight, encode
from minigpt.errors import ConversionError, EncodingError

Floats = NDArray[np.float32]

ROWS = 4096  # compared at a time, so that no second copy of a large table is decoded
TINY = 1e-6  # the absolute share of an encoding's error: scales and values may fall into f16's subnormals


@dataclass(frozen=True)
class Source:
    """A foreign model, described in full and not yet read.

    Attributes
    ----------
    config : Config
    vocabulary : Vocabulary
    tensors : mapping of str to callable
        Canonical name -> function that reads the tensor as float32, matrices as [n_out, n_in].
        Without lm_head.weight the head is tied to wte.weight.
    history : dict
        Where the model comes from and what was merged or trimmed on the way.
    """

    config: Config
    vocabulary: Vocabulary
    tensors: Mapping[str, Callable[[], Floats]]
    history: dict[str, Any]


def write(source: Source, out: str | os.PathLike[str], encoding: str = "f32") -> Checkpoint:
    """Encode a source tensor by tensor, write it, reopen the file, compare, and only then put it in place.

    Beyond the result, one tensor in float32 is held at a time. What was at `out` stays until the last step.

    Parameters
    ----------
    source : Source
    out : path
        The `.mgpt` file to make.
    encoding : str
        Of the matrices, a key of `ENCODINGS`; tables, positions and vectors follow `encoding_for`.

    Returns
    -------
    Checkpoint
        The new file, opened.

    Raises
    ------
    ConversionError
        If a tensor is missing, unknown, misshapen or cannot be encoded, or the written file differs.
    """
    out = Path(out)
    if encoding not in ENCODINGS:
        raise EncodingError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    if not out.parent.is_dir() or out.is_dir():
        raise ConversionError(f"cannot write {out}: give a file name in a folder that exists")
    weights = {name: _encoded(source, name, encoding) for name in _names(source)}
    weights.setdefault("lm_head.weight", weights["wte.weight"])
    history = {"step": "convert", **source.history, "encoding": encoding}
    made = Checkpoint(source.config, source.vocabulary, weights, (history,))
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".minigpt-") as folder:
            save(made, written := Path(folder) / out.name)
            _compare(made, load(written))
            os.replace(written, out)
    except OSError as error:
        raise ConversionError(f"cannot write {out}: {error.strerror}; choose another folder") from None
    return load(out)


def _names(source: Source) -> list[str]:
    """Return the names to convert, in the model's order, if the source gives each once and no other."""
    names = [n for n in source.config.shapes() if n in source.tensors or n != "lm_head.weight"]
    if missing := [n for n in names if n not in source.tensors]:
        raise ConversionError(f"tensor {missing[0]} is missing ({len(missing)} in all); copy it again")
    if unknown := sorted(set(source.tensors) - set(names)):
        raise ConversionError(f"tensor {unknown[0]} has no place in this GPT-2")
    return names


def _encoded(source: Source, name: str, encoding: str) -> Weight:
    w = source.tensors[name]()
    shape = source.config.shapes()[name]
    if w.shape != shape:
        raise ConversionError(f"tensor {name} is {w.shape}, but the configuration asks for {shape}")
    try:
        weight = encode(w, encoding_for(name, encoding))
    except EncodingError as error:
        raise ConversionError(f"tensor {name}: {error}") from None
    for begin in range(0, len(w), ROWS):
        exact, decoded = w[begin : begin + ROWS], weight.rows(slice(begin, begin + ROWS))
        bound = weight.encoding.max_error * np.abs(exact).max(axis=-1, keepdims=True) + TINY
        if not (np.abs(decoded - exact) <= bound).all():
            raise ConversionError(f"tensor {name} exceeds the error of {weight.encoding.name}; use f32")
    return weight


def _compare(made: Checkpoint, read: Checkpoint) -> None:
    """Raise unless a reopened checkpoint equals the one that was written, part by part."""
    vocabularies = [(v.token_bytes, v.token_ends, v.merges) for v in (made.vocabulary, read.vocabulary)]
    same = (
        made.config == read.config
        and made.history == read.history
        and made.tied == read.tied
        and made.vocabulary.special_tokens == read.vocabulary.special_tokens
        and all(map(np.array_equal, *vocabularies))
        and made.weights.keys() == read.weights.keys()
    )
    if not same:
        raise ConversionError("the configuration or vocabulary differs after writing; convert again")
    for name, weight in made.weights.items():
        parts = read.weights[name].parts
        if not all(np.array_equal(part, parts[key]) for key, part in weight.parts.items()):
            raise ConversionError(f"tensor {name} differs after writing; check the disk and convert again")
