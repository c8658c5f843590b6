"""`int8`: symmetric 8-bit codes with one scale per row, w[o, i] = codes[o, i] * scales[o]; `int8_g32`...: per group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import ENCODINGS, Floats, Parts, Rows, Weight
from minigpt.encodings.grid import Grid, Mask, OnGrid, half, pad_columns


class Int8(OnGrid):
    """Round to nearest, codes -127..127, 8 bits a weight and one float32 a row."""

    name = "int8"
    part_dtypes = {"codes": "|i1", "scales": "<f4"}
    activation = "i16"
    tables = "int8_split"
    positions = "f16"  # 1024 rows that are added as they are: not worth an error of half a step
    twin = "int8"
    lowest, highest = -127, 127
    max_error = 0.5 / 127 * 1.0001

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Codes of the matrix's shape, one scale per row."""
        n_out, n_in = shape
        return {"codes": (n_out, n_in), "scales": (n_out,)}

    def fit(self, w: Floats, symmetric: bool = True) -> tuple[Floats, Floats]:
        """Make the largest magnitude 127; a row of zeros has the scale 0."""
        scales = np.abs(w).max(axis=1) / np.float32(127)
        return scales, np.zeros_like(scales)

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store all codes."""
        return {"codes": codes.astype(np.int8), "scales": grid.scales[:, 0].astype("<f4")}

    def codes(self, parts: Parts, n_in: int, rows: Rows) -> NDArray[np.int8]:
        """Return the chosen rows of codes [n_rows, n_in]: what encodings of the same codes differ in."""
        return parts["codes"][rows]

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Multiply the codes by their row's scale."""
        w = self.codes(parts, n_in, rows).astype(np.float32)  # [n_rows, n_in]
        w *= parts["scales"][rows][:, None]
        return w

    def expand(self, parts: Parts, shape: tuple[int, ...]) -> Weight:
        """Return the same codes and scales as a dense matrix."""
        codes = np.ascontiguousarray(self.codes(parts, shape[1], slice(None)))
        return Weight(ENCODINGS["int8"], shape, {"codes": codes, "scales": parts["scales"]})


class Int8G32(OnGrid):
    """Codes -127..127 with a scale in f16 for every 32 columns: 8.5 bits a weight. A row is padded to whole groups."""

    name = "int8_g32"
    group = 32
    part_dtypes = {"codes": "|i1", "scales": "<f2"}
    activation = "i16"
    tables = "int8_split"
    positions = "f16"
    lowest, highest = -127, 127
    max_error = 0.5 / 127 + 2.0**-11

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Codes of whole groups, one scale for each."""
        n_out, n_in = shape
        groups = -(-n_in // self.group)
        return {"codes": (n_out, groups * self.group), "scales": (n_out, groups)}

    def fit(self, w: Floats, symmetric: bool = True) -> tuple[Floats, Floats]:
        """Make the largest magnitude 127."""
        scales = half(np.abs(w).max(axis=1) / np.float32(127))
        return scales, np.zeros_like(scales)

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store all codes, zeros in the padding."""
        return {"codes": pad_columns(codes.astype(np.int8), self.group), "scales": grid.scales.astype("<f2")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Multiply the codes by their group's scale."""
        scales = parts["scales"][rows].astype(np.float32)  # [n_rows, n_groups]
        w = parts["codes"][rows].astype(np.float32).reshape(*scales.shape, self.group)
        w *= scales[..., None]
        return w.reshape(len(w), -1)[:, :n_in]


class Int8G64(Int8G32):
    """The same with 64 columns to a scale: 8.25 bits a weight."""

    name = "int8_g64"
    group = 64


class Int8G128(Int8G32):
    """The same with 128 columns to a scale: 8.125 bits a weight."""

    name = "int8_g128"
    group = 128
