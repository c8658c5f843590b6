"""Encodings that store whole numbers on a uniform grid: w = code * scale + minimum, per group of columns.

Choosing the grid, rounding to it and packing the codes are separate methods, so that compression can round with
care (one column after the other, scales of its own) and still store what plain rounding stores.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import Array, Encoding, Floats, Parts
from minigpt.errors import EncodingError

Mask = NDArray[np.bool_]

LARGEST = float(np.finfo(np.float16).max)  # 65504
ROUND_WEIGHTS = 1 << 21  # rounded at a time: the intermediates of a large table would be five times its size


class Grid(NamedTuple):
    """Scales and minimums of a matrix, float32 [n_out, n_groups] each, already rounded to how they are stored."""

    scales: Floats
    minimums: Floats

    def columns(self, n_in: int, group: int) -> Grid:
        """Repeat both for each column: [n_out, n_in]."""
        each = np.arange(n_in) // (group or n_in)
        return Grid(self.scales[:, each], self.minimums[:, each])


class OnGrid(Encoding):
    """Base of the encodings with codes.

    Attributes
    ----------
    group : int
        Columns that share a scale and a minimum; 0: the whole row.
    lowest, highest : int
        The range of codes.
    sparse : bool
        Whether zeros are left out; if not, a zero is rounded like any other weight.
    """

    group: ClassVar[int] = 0
    lowest: ClassVar[int]
    highest: ClassVar[int]
    sparse: ClassVar[bool] = False

    @abstractmethod
    def fit(self, w: Floats, symmetric: bool = False) -> tuple[Floats, Floats]:
        """Return scale [n] and minimum [n] of groups w [n, width]; symmetric: zero is on the grid."""

    @abstractmethod
    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Return the parts that stand for codes [n_out, n_in]; a sparse encoding stores those that are kept."""

    def kept(self, w: Floats) -> Mask:
        """Return which weights of w [n_out, n_in] are stored."""
        kept: Mask = w != 0
        return kept

    def grid(self, w: Floats, symmetric: bool = False) -> Grid:
        """Return the grid that spans every group of w [n_out, n_in]."""
        scales, minimums = zip(*(self._grid(w[rows], symmetric) for rows in few_rows(w)), strict=True)
        return Grid(np.concatenate(scales), np.concatenate(minimums))

    def _grid(self, w: Floats, symmetric: bool) -> Grid:
        width = self.group or w.shape[1]
        groups = np.pad(w, ((0, 0), (0, -w.shape[1] % width)), mode="edge").reshape(-1, width)
        scales, minimums = self.fit(groups, symmetric)
        return Grid(scales.reshape(len(w), -1), minimums.reshape(len(w), -1))

    def round(self, w: Floats, scales: Floats, minimums: Floats) -> Floats:
        """Return the nearest codes of w, still as floats; all arguments broadcast."""
        steps = np.where(scales != 0, scales, np.float32(1))  # a group of one value sits on its minimum
        return np.clip(np.rint((w - minimums) / steps), self.lowest, self.highest)

    def encode(self, w: Floats) -> Parts:
        """Round every weight to the nearest point of the grid that spans its group."""
        return self.encode_on(self.grid(w), w)

    def encode_on(self, grid: Grid, w: Floats) -> Parts:
        """Round every weight to the nearest point of a given grid."""
        codes = np.empty(w.shape, np.int16)
        for rows in few_rows(w):
            columns = Grid(grid.scales[rows], grid.minimums[rows]).columns(w.shape[1], self.group)
            codes[rows] = self.round(w[rows], *columns)
        return self.pack(codes, grid, self.kept(w))


def few_rows(w: Floats) -> Iterator[slice]:
    """Yield some rows after the others, few enough for intermediates to be small."""
    step = max(1, ROUND_WEIGHTS // w.shape[1])
    return (slice(begin, begin + step) for begin in range(0, len(w), step))


def pack_nibbles(codes: Array) -> NDArray[np.uint8]:
    """Pack codes 0..15, [n, multiple of 32], into bytes: byte j of 32 codes holds codes j and j + 16."""
    halves = codes.astype(np.uint8).reshape(len(codes), -1, 2, 16)
    packed: NDArray[np.uint8] = halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)
    return packed.reshape(len(codes), -1)


def unpack_nibbles(packed: Array) -> NDArray[np.uint8]:
    """Undo `pack_nibbles`: [n, n_bytes] -> [n, 2 * n_bytes]."""
    packed = packed.reshape(len(packed), -1, 1, 16)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def pad_columns(array: Array, multiple: int) -> Array:
    """Append columns of zeros up to a multiple."""
    return np.pad(array, ((0, 0), (0, -array.shape[1] % multiple)))


def half(values: Floats) -> Floats:
    """Round to f16, the precision in which scales are stored, and back.

    Raises
    ------
    EncodingError
        If a value is beyond f16.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if largest > LARGEST:
        raise EncodingError(f"a scale or minimum of {largest:g} is beyond f16's {LARGEST:g}; use f32 for this matrix")
    return values.astype(np.float16).astype(np.float32)
