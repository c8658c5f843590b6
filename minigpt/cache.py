"""`KVCache`: the keys and values of the tokens that a model has seen, for one or more sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Config

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class KVCache:
    """Keys and values of the tokens that a model has seen, for one or more sequences.

    Memory is claimed from the system only where positions are written, so a full-length cache costs a short
    text nothing.

    Attributes
    ----------
    k, v : list of ndarray of shape (n_sequences, n_head, n_positions, head_dim), dtype=float32
        One of each per layer.
    lengths : ndarray of shape (n_sequences,), dtype=int64
        How many positions of each sequence are filled.
    """

    def __init__(self, config: Config, n_sequences: int = 1) -> None:
        shapes = [(n_sequences, n_head, config.n_positions, config.head_dim) for n_head in config.n_head]
        self.k: list[Floats] = [np.zeros(shape, np.float32) for shape in shapes]
        self.v: list[Floats] = [np.zeros(shape, np.float32) for shape in shapes]
        self.lengths: Ids = np.zeros(n_sequences, np.int64)

    @property
    def n_sequences(self) -> int:
        """How many sequences the cache has room for."""
        return len(self.lengths)

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forget the positions of a sequence from `length` on."""
        self.lengths[sequence] = min(length, int(self.lengths[sequence]))

    def reorder(self, order: Sequence[int] | Ids) -> None:
        """Let sequence i become what sequence order[i] was, as beam search needs it; only used positions move."""
        order = np.asarray(order)
        moved = np.flatnonzero(order != np.arange(len(order)))
        used = int(self.lengths[order].max(initial=0))
        for cache in (*self.k, *self.v):
            cache[moved, :, :used] = cache[order[moved], :, :used]
        self.lengths[moved] = self.lengths[order[moved]]
