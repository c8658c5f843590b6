"""`int4`: asymmetric 4-bit codes in groups of 32 along a row. w = code * scale + minimum, both per group in f16.

A byte holds two codes: byte j of a group has element j in its low and element j + 16 in its high nibble,
so that a vector unit splits 16 bytes into 32 consecutive elements with one mask and one shift.
A row whose length is no multiple of 32 is padded; the padding is dropped again when decoding.
"""

from __future__ import annotations

import numpy as np

from minigpt.encodings.base import Encoding, Floats, Parts, Rows
from minigpt.errors import EncodingError

GROUP = 32
LARGEST = float(np.finfo(np.float16).max)


class Int4(Encoding):
    """Round to nearest, codes 0..15, 5 bits a weight with the group's scale and minimum."""

    name = "int4"
    part_dtypes = {"codes": "|u1", "scales": "<f2", "minimums": "<f2"}
    activation = "i16"
    tables = "int8"  # 4-bit tables destroy GPT-2: perplexity 353 against 25.6 with int8 ones (mhoffma/llm_mojo)
    positions = "f16"
    max_error = 2 * (0.5 / 15 + 2.0**-10)

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """16 bytes of codes, a scale and a minimum for every group of 32."""
        n_out, n_in = shape
        groups = -(-n_in // GROUP)
        return {"codes": (n_out, groups * GROUP // 2), "scales": (n_out, groups), "minimums": (n_out, groups)}

    def encode(self, w: Floats) -> Parts:
        """Map each group's range to 0..15, with scale and minimum rounded to f16 before the codes are chosen."""
        n_out, n_in = w.shape
        if (largest := float(np.abs(w).max(initial=0.0))) > LARGEST:
            raise EncodingError(f"a weight of {largest:g} is beyond int4's {LARGEST:g}; use f32 for this matrix")
        groups = np.pad(w, ((0, 0), (0, -n_in % GROUP)), mode="edge").reshape(n_out, -1, GROUP)
        minimums = groups.min(axis=2).astype("<f2")  # [n_out, n_groups]
        span = groups.max(axis=2) - minimums.astype(np.float32)
        scales = (span / 15).astype("<f2")
        steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[..., None]
        codes = np.rint((groups - minimums.astype(np.float32)[..., None]) / steps)
        codes = np.clip(codes, 0, 15).astype(np.uint8)  # [n_out, n_groups, 32]
        packed = codes[..., :16] | codes[..., 16:] << 4
        return {"codes": packed.reshape(n_out, -1), "scales": scales, "minimums": minimums}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Unpack the nibbles and undo the affine map."""
        scales = parts["scales"][rows].astype(np.float32)[..., None]  # [n_rows, n_groups, 1]
        minimums = parts["minimums"][rows].astype(np.float32)[..., None]
        packed = parts["codes"][rows].reshape(*scales.shape[:2], GROUP // 2)
        w = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.float32)  # [n_rows, n_groups, 32]
        w *= scales
        w += minimums
        return w.reshape(len(w), -1)[:, :n_in]
