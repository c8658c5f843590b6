"""`KVCache`: the keys and values of the tokens that a model has seen, for one or more sequences, and ways to keep them.

A way to keep them is a row of `KINDS` and a kernel `attend_<kind>` in `kernels/attention.py`, which computes on what is
kept; the NumPy backend decodes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Config
from minigpt.errors import OptionError
from minigpt.layout import CENTRED

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class F32Store:
    """The keys or the values of a layer as they are.

    Memory is claimed from the system only where positions are written, so a full-length cache costs a short
    text nothing.

    Parameters
    ----------
    shape : tuple of int
        (n_sequences, n_head, n_positions, head_dim)

    Attributes
    ----------
    parts : tuple of ndarray
        What is kept, in the order in which kernels take it. The third dimension counts positions, or blocks of them.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.parts: tuple[NDArray[Any], ...] = (np.zeros(shape, np.float32),)

    def write(self, sequence: int, positions: slice, rows: Floats) -> None:
        """Keep rows [n_head, n_tokens, head_dim] at these positions of a sequence."""
        self.parts[0][sequence, :, positions] = rows

    def read(self, sequence: int, end: int) -> Floats:
        """Return the rows of all positions before `end`: [n_head, end, head_dim]."""
        return self.parts[0][sequence, :, :end]


class Int8Store(F32Store):
    """Codes of int8 with a scale for each position and head."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.parts = np.zeros(shape, np.int8), np.zeros(shape[:-1], np.float32)

    def write(self, sequence: int, positions: slice, rows: Floats) -> None:
        """Round rows and keep them."""
        codes, scales, *_ = self.parts
        here = np.maximum(np.abs(rows).max(axis=-1), np.float32(1e-9)) / np.float32(127)  # [n_head, n_tokens]
        codes[sequence, :, positions] = np.rint(rows / here[..., None])
        scales[sequence, :, positions] = here

    def read(self, sequence: int, end: int) -> Floats:
        """Return what the codes stand for."""
        codes, scales = (part[sequence, :, :end] for part in self.parts[:2])
        return codes * scales[..., None]


class CentredInt8Store(Int8Store):
    """The same of what differs from a centre, the first row of each CENTRED positions, kept as it is.

    Keys of neighbours have much in common, in some layers far more than what tells them apart: rounded as they
    are, they cost GPT-2 124M twelve times as much KL divergence.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        n_sequences, n_head, n_positions, head_dim = shape
        self.parts += (np.zeros((n_sequences, n_head, -(-n_positions // CENTRED), head_dim), np.float32),)

    def write(self, sequence: int, positions: slice, rows: Floats) -> None:
        """Keep the first rows of blocks as centres, and round the distances of all."""
        centres, at = self.parts[2][sequence], np.arange(positions.start, positions.stop)
        first = at % CENTRED == 0
        centres[:, at[first] // CENTRED] = rows[:, first]
        super().write(sequence, positions, rows - centres[:, at // CENTRED])

    def read(self, sequence: int, end: int) -> Floats:
        """Return what the codes stand for."""
        return super().read(sequence, end) + self.parts[2][sequence][:, np.arange(end) // CENTRED]


WORTH = 0.25  # share of logits up to which making them exact, row by row, costs less than all of them would
EXACT_CALLS = 4  # after one that was not worth it: kept here so that a text does not depend on those before

KINDS: dict[str, tuple[type[F32Store], type[F32Store]]] = {  # of keys, of values
    "f32": (F32Store, F32Store),
    "int8": (CentredInt8Store, Int8Store),
}


class KVCache:
    """Keys and values of the tokens that a model has seen, for one or more sequences.

    Parameters
    ----------
    config : Config
    n_sequences : int
    kind : {"f32", "int8"}
        How to keep them: as they are, or rounded, in little more than a quarter of the memory.

    Attributes
    ----------
    kind : str
    k, v : list of F32Store
        One of each per layer.
    lengths : ndarray of shape (n_sequences,), dtype=int64
        How many positions of each sequence are filled.
    """

    def __init__(self, config: Config, n_sequences: int = 1, kind: str = "f32") -> None:
        shapes = [(n_sequences, n_head, config.n_positions, config.head_dim) for n_head in config.n_head]
        self.kind = checked_kind(kind)
        self.k, self.v = ([store(shape) for shape in shapes] for store in KINDS[self.kind])
        self.lengths: Ids = np.zeros(n_sequences, np.int64)
        self._exact_calls = 0

    @property
    def n_sequences(self) -> int:
        """How many sequences the cache has room for."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of all positions, whether they are filled or not."""
        return sum(part.nbytes for store in (*self.k, *self.v) for part in store.parts)

    def may_be_rough(self) -> bool:
        """Tell whether rough logits are likely to pay for the next tokens; each question counts as a call."""
        self._exact_calls -= 1
        return self._exact_calls < 0

    def note_exact(self, share: float) -> None:
        """Learn how many of rough logits had to be made exact: where that was dear, the next calls are exact."""
        self._exact_calls = EXACT_CALLS if share > WORTH else 0

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forget the positions of a sequence from `length` on."""
        self.lengths[sequence] = min(length, int(self.lengths[sequence]))

    def reorder(self, order: Sequence[int] | Ids) -> None:
        """Let sequence i become what sequence order[i] was, as beam search needs it; only used positions move."""
        order = np.asarray(order)
        moved = np.flatnonzero(order != np.arange(len(order)))
        used = int(self.lengths[order].max(initial=0))
        for store in (*self.k, *self.v):
            for part in store.parts:
                end = -(-used * part.shape[2] // store.parts[0].shape[2])  # positions, or blocks of them
                part[moved, :, :end] = part[order[moved], :, :end]
        self.lengths[moved] = self.lengths[order[moved]]


def checked_kind(kind: str) -> str:
    """Return the name of a way to keep keys and values.

    Raises
    ------
    OptionError
        If there is none of this name.
    """
    if kind not in KINDS:
        raise OptionError(f"kv_cache = {kind!r} is not allowed; give one of {', '.join(KINDS)}")
    return kind
