"""`nm_int8`, `nm_int4`: at most 4 of every 8 columns are not zero, as 2:4 and 4:8 pruning leave them.

A byte says which 4 (bit i is column i of the 8), and exactly 4 codes follow for every byte, so that no row needs
an offset. Where fewer than 4 weights are left, zeros fill their places.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import ENCODINGS, Array, Encoding, Floats, Parts, Rows, Weight
from minigpt.encodings.bitmap import ONES, pack_bits, unpack_bits
from minigpt.encodings.grid import Grid, Mask, OnGrid, pack_nibbles, pad_columns, unpack_nibbles
from minigpt.encodings.int8 import Int8
from minigpt.errors import EncodingError

N, M = 4, 8


def pack_codes(codes: Array, kept: Mask, multiple: int) -> tuple[Array, Array]:
    """Return masks [n_out, n_in / 8] and the kept codes [n_out, n_in / 2], n_in padded to a multiple (of 32)."""
    kept = four_of_eight(pad_columns(kept, multiple))
    return pack_bits(kept), pad_columns(codes, multiple)[kept].reshape(len(codes), -1)


def unpack_codes(masks: Array, codes: Array, empty: int) -> Array:
    """Undo `pack_codes`: [n_rows, n_bytes], [n_rows, 4 n_bytes] -> [n_rows, 8 n_bytes] with `empty` in the gaps."""
    kept = unpack_bits(masks, masks.shape[1] * M)
    full = np.full(kept.shape, empty, codes.dtype)
    full[kept] = codes.reshape(-1)
    return full


def four_of_eight(kept: Mask) -> Mask:
    """Fill up every group of 8 columns to exactly 4 kept ones: [n_out, multiple of 8].

    Raises
    ------
    EncodingError
        If a group keeps more than 4.
    """
    groups = kept.reshape(len(kept), -1, M)
    counts = groups.sum(axis=2)  # [n_out, n_groups]
    if (counts > N).any():
        row, group = np.argwhere(counts > N)[0]
        raise EncodingError(
            f"row {row} has {counts[row, group]} weights in columns {M * group}..{M * group + M - 1}, allowed are {N}; "
            "prune with the pattern 2:4 or 4:8 first"
        )
    vacant = np.cumsum(~groups, axis=2) <= (N - counts)[..., None]
    full: Mask = (groups | (~groups & vacant)).reshape(kept.shape)
    return full


class NM(Encoding):
    """What both encodings share: which weights they store, and the check that every mask has 4 bits."""

    multiple = 32

    def kept(self, w: Floats) -> Mask:
        """Return the 4 of every 8 columns that are stored: all that are not zero, and some that are."""
        return four_of_eight(pad_columns(w != 0, self.multiple))[:, : w.shape[1]]

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Count the bits of every mask."""
        if (ONES[parts["masks"]] != N).any():
            raise EncodingError(f"a mask of a {self.name} matrix does not keep {N} of {M} columns; make the file again")


class NMInt8(NM, Int8):
    """The codes of `int8` at 5 bits a weight."""

    name = "nm_int8"
    part_dtypes = {"masks": "|u1", "codes": "|i1", "scales": "<f4"}
    sparse = True

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return those of a byte and 4 codes for 8 columns, one scale per row."""
        n_out, n_in = shape
        groups = -(-n_in // self.multiple)
        return {"masks": (n_out, groups * 4), "codes": (n_out, groups * 16), "scales": (n_out,)}

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store 4 of every 8 codes."""
        masks, packed = pack_codes(np.where(kept, codes, 0).astype(np.int8), kept, self.multiple)
        return {"masks": masks, "codes": packed, "scales": grid.scales[:, 0].astype("<f4")}

    def codes(self, parts: Parts, n_in: int, rows: Rows) -> NDArray[np.int8]:
        """Put the zeros back: [n_rows, n_in]."""
        return unpack_codes(parts["masks"][rows], parts["codes"][rows], 0)[:, :n_in]


class NMInt4(NM, OnGrid):
    """4-bit codes, symmetric, with a scale in f16 for every 64 columns: 3.25 bits a weight, w = (code - 8) * scale."""

    name = "nm_int4"
    group = multiple = 64  # 32 codes in 16 bytes
    part_dtypes = {"masks": "|u1", "codes": "|u1", "scales": "<f2"}
    activation = "i8"
    tables = "int8_split"
    positions = "f16"
    twin = "int4_g64"
    sparse = True
    lowest, highest = 0, 15
    max_error = 0.5 / 7.5 + 2.0**-10

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return those of a byte and 4 half bytes for 8 columns, one scale for 64."""
        n_out, n_in = shape
        groups = -(-n_in // 64)
        return {"masks": (n_out, groups * 8), "codes": (n_out, groups * 16), "scales": (n_out, groups)}

    def fit(self, w: Floats, symmetric: bool = True) -> tuple[Floats, Floats]:
        """Span the largest magnitude with 8 steps on either side of zero."""
        return ENCODINGS["int4"].fit(w, symmetric=True)  # type: ignore[attr-defined]

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store 4 of every 8 codes, two to a byte."""
        codes = np.pad(np.where(kept, codes, 8), ((0, 0), (0, -codes.shape[1] % 64)), constant_values=8)
        masks, packed = pack_codes(codes, kept, 64)
        return {"masks": masks, "codes": pack_nibbles(packed), "scales": grid.scales.astype("<f2")}

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Put the zeros back and scale."""
        scales = parts["scales"][rows].astype(np.float32)  # [n_rows, n_groups]
        codes = unpack_codes(parts["masks"][rows], unpack_nibbles(parts["codes"][rows]), 8)
        w = (codes.astype(np.float32) - 8).reshape(*scales.shape, 64) * scales[..., None]
        return w.reshape(len(w), -1)[:, :n_in]

    def expand(self, parts: Parts, shape: tuple[int, ...]) -> Weight:
        """Return the same codes as a dense matrix of `int4`, symmetric."""
        scales = parts["scales"].astype(np.float32)
        codes = unpack_codes(parts["masks"], unpack_nibbles(parts["codes"]), 8)[:, : shape[1]]
        dense = ENCODINGS[self.twin]
        packed = dense.pack(codes, Grid(scales, -8 * scales), codes != 8)  # type: ignore[attr-defined]
        return dense.expand(packed, shape)
