"""`bitmap_int8`, `bitmap_f16`: one bit for every weight, and the weights that are not zero one after the other.

Bit i of byte j of a row's bitmap is column 8 j + i; a row is padded to whole groups of 32. The values of row o begin
at offsets[o]. After the last one stand SLACK zeros, so that a vector may be loaded where only a part of it is wanted.
Smaller than the dense form from 12.5 % zeros (int8) or 6.3 % (f16).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import ANY, Array, Encoding, Floats, Parts, Rows
from minigpt.encodings.f16 import F16
from minigpt.encodings.grid import Grid, Mask, pad_columns
from minigpt.encodings.int8 import Int8
from minigpt.errors import EncodingError

SLACK = 64  # values: the widest vector, of int8
ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)  # bits that are set in a byte


def pack_bits(kept: Mask) -> NDArray[np.uint8]:
    """Pack a mask [n_out, n_in] into bytes [n_out, n_in / 8], rows padded to whole groups of 32 columns."""
    bits: NDArray[np.uint8] = np.packbits(pad_columns(kept, 32), axis=1, bitorder="little")
    return bits


def unpack_bits(bitmap: Array, n_in: int) -> Mask:
    """Undo `pack_bits`: [n_rows, n_bytes] -> [n_rows, n_in]."""
    return np.unpackbits(bitmap.astype(np.uint8, copy=False), axis=1, bitorder="little")[:, :n_in].astype(np.bool_)


def pack_values(values: Array, kept: Mask) -> dict[str, Array]:
    """Return the parts `bitmap`, `offsets` and `values` of a matrix [n_out, n_in]."""
    offsets = np.append(0, np.cumsum(kept.sum(axis=1)))
    return {
        "bitmap": pack_bits(kept),
        "offsets": offsets.astype("<u4"),
        "values": np.append(values[kept], np.zeros(SLACK, values.dtype)),
    }


def unpack_values(parts: Parts, n_in: int, rows: Rows) -> NDArray[Any]:
    """Return the chosen rows [n_rows, n_in] with their zeros."""
    kept = unpack_bits(parts["bitmap"][rows], n_in)
    place = parts["offsets"][:-1][rows].astype(np.int64)[:, None] + np.cumsum(kept, axis=1) - kept
    return np.where(kept, parts["values"][np.where(kept, place, 0)], parts["values"].dtype.type(0))


def shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `pack_values`."""
    n_out, n_in = shape
    return {"bitmap": (n_out, -(-n_in // 32) * 4), "offsets": (n_out + 1,), "values": (ANY,)}


class Bitmap(Encoding):
    """What the encodings with a bitmap share: the check that no row leads outside the values."""

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Compare the offsets with the number of bits in each row, and the last with the number of values."""
        offsets = parts["offsets"].astype(np.int64)
        counted = ONES[parts["bitmap"]].sum(axis=1, dtype=np.int64)  # [n_out]
        if offsets[0] != 0 or (np.diff(offsets) != counted).any():
            raise EncodingError(f"the offsets of a {self.name} matrix contradict its bitmap; make the file again")
        if len(parts["values"]) != offsets[-1] + SLACK:
            raise EncodingError(
                f"a {self.name} matrix with {offsets[-1]} weights must have {offsets[-1] + SLACK} values, "
                f"not {len(parts['values'])}; make the file again"
            )
        if unpack_bits(parts["bitmap"], parts["bitmap"].shape[1] * 8)[:, shape[1] :].any():
            raise EncodingError(f"the bitmap of a {self.name} matrix has bits beyond column {shape[1] - 1}")


class BitmapInt8(Bitmap, Int8):
    """The codes of `int8` without the zeros: 1 + 8 (1 - sparsity) bits a weight."""

    name = "bitmap_int8"
    part_dtypes = {"bitmap": "|u1", "offsets": "<u4", "values": "|i1", "scales": "<f4"}
    sparse = True

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return those of a bit a weight, where each row begins, the values, one scale per row."""
        return shapes(shape) | {"scales": (shape[0],)}

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store the codes that are kept and not zero."""
        return pack_values(codes.astype(np.int8), kept & (codes != 0)) | {"scales": grid.scales[:, 0].astype("<f4")}

    def codes(self, parts: Parts, n_in: int, rows: Rows) -> NDArray[np.int8]:
        """Put the zeros back: [n_rows, n_in]."""
        return unpack_values(parts, n_in, rows)


class BitmapF16(Bitmap):
    """Half precision without the zeros: 1 + 16 (1 - sparsity) bits a weight."""

    name = "bitmap_f16"
    part_dtypes = {"bitmap": "|u1", "offsets": "<u4", "values": "<f2"}
    tables = positions = twin = "f16"
    max_error = F16.max_error

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return those of a bit a weight, where each row begins, and the values."""
        return shapes(shape)

    def encode(self, w: Floats) -> Parts:
        """Round to half precision and drop the zeros."""
        values = F16().encode(w)["values"]
        return pack_values(values, np.asarray(values != 0))

    def decode(self, parts: Parts, n_in: int, rows: Rows) -> Floats:
        """Put the zeros back and widen to float32."""
        return unpack_values(parts, n_in, rows).astype(np.float32)
