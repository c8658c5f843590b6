"""`int8`: symmetric 8-bit codes with one scale per row. w[o, i] = codes[o, i] * scales[o]."""

from __future__ import annotations

import numpy as np

from minigpt.encodings.base import Encoding, Floats, Parts, Rows


class Int8(Encoding):
    """Round to nearest, codes -127..127, 8 bits a weight and one float32 a row."""

    name = "int8"
    part_dtypes = {"codes": "|i1", "scales": "<f4"}
    activation = "i16"
    tables = "int8"
    positions = "f16"  # 1024 rows that are added as they are: not worth an error of half a step
    max_error = 0.5 / 127 * 1.0001

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Codes of the matrix's shape, one scale per row."""
        n_out, n_in = shape
        return {"codes": (n_out, n_in), "scales": (n_out,)}

    def encode(self, w: Floats) -> Parts:
        """Scale each row so that its largest magnitude becomes 127, and round."""
        scales = np.abs(w).max(axis=1) / np.float32(127)  # [n_out]
        steps = np.where(scales > 0, scales, np.float32(1))  # a row of zeros stays zeros
        codes = np.clip(np.rint(w / steps[:, None]), -127, 127).astype(np.int8)  # [n_out, n_in]
        return {"codes": codes, "scales": scales.astype("<f4")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Multiply the codes by their row's scale."""
        w = parts["codes"][rows].astype(np.float32)  # [n_rows, n_in]
        w *= parts["scales"][rows][:, None]
        return w
