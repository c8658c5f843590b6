"""`f16`: IEEE half precision; half the bytes of f32 at no measurable loss for GPT-2."""

from __future__ import annotations

import numpy as np

from minigpt.encodings.base import Encoding, Floats, Parts, Rows
from minigpt.errors import EncodingError

LARGEST = float(np.finfo(np.float16).max)  # 65504


class F16(Encoding):
    """IEEE half precision, 16 bits a weight."""

    name = "f16"
    part_dtypes = {"values": "<f2"}
    tables, positions = "f16_screened", "f16"
    max_error = 2.0**-11

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """One part of the matrix's own shape."""
        return {"values": shape}

    def encode(self, w: Floats) -> Parts:
        """Round to the nearest half; refuse what would become infinite."""
        largest = float(np.abs(w).max(initial=0.0))
        if largest > LARGEST:
            raise EncodingError(f"a weight of {largest:g} is beyond f16's {LARGEST:g}; use f32 for this matrix")
        return {"values": w.astype("<f2")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Widen the rows to float32."""
        return parts["values"][rows].astype(np.float32)
