"""`f32`: the values as they are. The only encoding of vectors, and the yardstick of the others."""

from __future__ import annotations

import numpy as np

from minigpt.encodings.base import Encoding, Floats, Parts, Rows


class F32(Encoding):
    """IEEE single precision, 32 bits a weight."""

    name = "f32"
    part_dtypes = {"values": "<f4"}
    tables, positions = "f32_screened", "f32"
    max_error = 0.0

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """One part of the matrix's own shape."""
        return {"values": shape}

    def encode(self, w: Floats) -> Parts:
        """Keep the values."""
        return {"values": w.copy()}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Return the rows, a view where `rows` is a range."""
        return np.asarray(parts["values"][rows], dtype=np.float32)

    def matmul(self, parts: Parts, shape: tuple[int, ...], x: Floats) -> Floats:
        """One BLAS call: nothing to decode, so no tiles."""
        return x @ np.asarray(parts["values"], dtype=np.float32).T
