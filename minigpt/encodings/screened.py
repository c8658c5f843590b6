"""`int8_split`, `f16_screened`, `f32_screened`: tables with a rough part of 4 bits a weight, which is read first.

Of a head's 50,257 products only the highest matter, and 4 bits of every weight are enough to see which can be among
them (`reference.screen`). `int8_split` has the codes of `int8` with their upper and lower halves apart, in as many
bytes; the other two have a copy in 4 bits beside their values. All are decoded to what int8, f16 and f32 are.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from minigpt import reference
from minigpt.encodings.base import Array, Encoding, Floats, Parts, Rows
from minigpt.encodings.f16 import F16
from minigpt.encodings.f32 import F32
from minigpt.encodings.grid import Grid, Mask, few_rows
from minigpt.encodings.int8 import Int8
from minigpt.layout import COLUMNS


class Screened(Encoding):
    """What the three share: which weights to multiply by first.

    Attributes
    ----------
    middle : float
        A weight is about (rough code - middle) * step of its row.
    """

    middle: ClassVar[float] = 7.5

    def rough(self, parts: Parts, n_in: int) -> tuple[NDArray[np.uint8], Floats]:
        """Return the rough codes, 0..15, [n_out, n_in], and their steps [n_out]."""
        return unpack_halves(parts["rough"])[:, :n_in], parts["steps"]

    def screen(self, parts: Parts, shape: tuple[int, ...], x: Floats) -> tuple[Floats, Floats]:
        """Return `reference.screen` of x [n_tokens, n_in]: products and how wrong they may be, [n_tokens, n_out]."""
        return reference.screen(*self.rough(parts, shape[1]), self.middle, x)


class Int8Split(Screened, Int8):
    """codes + 128 = 16 * upper + lower. A row is padded to 128 columns."""

    name = "int8_split"
    first = ("upper", "scales")
    part_dtypes = {"upper": "|u1", "lower": "|u1", "scales": "<f4"}
    middle = 120.5 / 16

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Half a byte a weight, twice, and one scale per row."""
        return {"upper": packed_shape(shape), "lower": packed_shape(shape), "scales": shape[:1]}

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Take the codes apart."""
        shifted = codes.astype(np.int8).view(np.uint8) ^ np.uint8(128)
        upper, lower = pack_halves(shifted >> 4), pack_halves(shifted & 15)
        return {"upper": upper, "lower": lower, "scales": grid.scales[:, 0].astype("<f4")}

    def codes(self, parts: Parts, n_in: int, rows: Rows) -> NDArray[np.int8]:
        """Put them together: [n_rows, n_in]."""
        shifted = unpack_halves(parts["upper"][rows]) << np.uint8(4)
        shifted |= unpack_halves(parts["lower"][rows])
        return (shifted ^ np.uint8(128)).view(np.int8)[:, :n_in]

    def rough(self, parts: Parts, n_in: int) -> tuple[NDArray[np.uint8], Floats]:
        """Return the upper halves."""
        return unpack_halves(parts["upper"])[:, :n_in], 16 * parts["scales"]


class F16Screened(Screened, F16):
    """f16 and a copy in 4 bits: 20 bits a weight."""

    name = "f16_screened"
    first = ("rough", "steps")
    part_dtypes = {"values": "<f2", "rough": "|u1", "steps": "<f4"}

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Those of f16, half a byte a weight, and one step per row."""
        return {"values": shape, "rough": packed_shape(shape), "steps": shape[:1]}

    def encode(self, w: Floats) -> Parts:
        """Keep a copy in 4 bits."""
        return {**super().encode(w), **rounded_to_4_bits(w)}


class F32Screened(Screened, F32):
    """f32 and a copy in 4 bits: 36 bits a weight."""

    name = "f32_screened"
    first = ("rough", "steps")
    part_dtypes = {"values": "<f4", "rough": "|u1", "steps": "<f4"}
    part_shapes = F16Screened.part_shapes

    def encode(self, w: Floats) -> Parts:
        """Keep a copy in 4 bits."""
        return {**super().encode(w), **rounded_to_4_bits(w)}


def rounded_to_4_bits(w: Floats) -> dict[str, Array]:
    """Return rough codes and steps: 15 steps from the largest magnitude of a row down to its negative."""
    steps = np.abs(w).max(axis=1, initial=0) / np.float32(7.5)  # [n_out]
    packed = np.empty(packed_shape(w.shape), np.uint8)
    for rows in few_rows(w):
        each = np.where(steps[rows] != 0, steps[rows], np.float32(1))[:, None]
        packed[rows] = pack_halves(np.clip(np.rint(w[rows] / each + np.float32(7.5)), 0, 15).astype(np.uint8))
    return {"rough": packed, "steps": steps.astype("<f4")}


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of `pack_halves`."""
    return shape[0], -(-shape[1] // COLUMNS) * COLUMNS // 2


def pack_halves(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack values 0..15, [n, n_in], two to a byte, rows padded to 128 columns."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % COLUMNS)), constant_values=8)
    halves = padded.reshape(len(values), -1, 2, COLUMNS // 2)
    packed: NDArray[np.uint8] = halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)
    return packed.reshape(len(values), -1)


def unpack_halves(packed: Array) -> NDArray[np.uint8]:
    """Undo `pack_halves`: [n, n_bytes] -> [n, 2 * n_bytes]."""
    packed = packed.reshape(len(packed), -1, 1, COLUMNS // 2)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
