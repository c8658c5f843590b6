"""`int4`: 4-bit codes in groups of 32 along a row. w = code * scale + minimum, both per group in f16.

A byte holds two codes: byte j of 32 columns has element j in its low and element j + 16 in its high nibble,
so that a vector unit splits 16 bytes into 32 consecutive elements with one mask and one shift.
A row whose length is no multiple of the group is padded; the padding is dropped again when decoding.
`int4_g64` and `int4_g128` have the same codes and fewer scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import ENCODINGS, Floats, Parts, Rows, Weight
from minigpt.encodings.grid import Grid, Mask, OnGrid, half, pack_nibbles, pad_columns, unpack_nibbles


class Int4(OnGrid):
    """Round to nearest, codes 0..15, 5 bits a weight with the group's scale and minimum."""

    name = "int4"
    group = 32
    part_dtypes = {"codes": "|u1", "scales": "<f2", "minimums": "<f2"}
    activation = "i8"
    tables = "int8_split"  # 4-bit tables destroy GPT-2: perplexity 353 against 25.6 with int8 ones (mhoffma/llm_mojo)
    positions = "f16"
    twin = "int4"
    lowest, highest = 0, 15
    max_error = 2 * (0.5 / 15 + 2.0**-10)

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Half a byte for each code of whole groups, a scale and a minimum for each group."""
        n_out, n_in = shape
        groups = -(-n_in // self.group)
        return {
            "codes": (n_out, groups * self.group // 2),
            "scales": (n_out, groups),
            "minimums": (n_out, groups),
        }

    def fit(self, w: Floats, symmetric: bool = False) -> tuple[Floats, Floats]:
        """Span the group's range with 15 steps or, symmetric, its largest magnitude with 8 steps on either side.

        The minimum is rounded to f16 before the scale is chosen, the scale before the codes are.
        """
        if symmetric:  # 8 steps are a power of two: the minimum is exact, and code 8 is exactly zero
            scales = half(np.abs(w).max(axis=1) / np.float32(7.5))
            return scales, half(-8 * scales)
        minimums = half(w.min(axis=1))
        return half((w.max(axis=1) - minimums) / 15), minimums

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store all codes, two to a byte."""
        return {
            "codes": pack_nibbles(pad_columns(codes, self.group)),
            "scales": grid.scales.astype("<f2"),
            "minimums": grid.minimums.astype("<f2"),
        }

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Unpack the nibbles and undo the affine map."""
        scales = parts["scales"][rows].astype(np.float32)  # [n_rows, n_groups]
        w = unpack_nibbles(parts["codes"][rows]).astype(np.float32).reshape(*scales.shape, self.group)
        w *= scales[..., None]
        w += parts["minimums"][rows].astype(np.float32)[..., None]
        return w.reshape(len(w), -1)[:, :n_in]

    def expand(self, parts: Parts, shape: tuple[int, ...]) -> Weight:
        """Return the same codes with the scales and minimums repeated for every 32 columns."""
        plain = ENCODINGS["int4"]
        n_bytes, groups = plain.part_shapes(shape)["codes"][1], plain.part_shapes(shape)["scales"][1]
        codes = np.ascontiguousarray(parts["codes"][:, :n_bytes])
        each = np.arange(groups) * 32 // self.group
        return Weight(plain, shape, {"codes": codes, **{p: parts[p][:, each] for p in ("scales", "minimums")}})


class Int4G64(Int4):
    """The same with 64 columns to a scale: 4.5 bits a weight."""

    name = "int4_g64"
    group = 64


class Int4G128(Int4):
    """The same with 128 columns to a scale: 4.25 bits a weight."""

    name = "int4_g128"
    group = 128
