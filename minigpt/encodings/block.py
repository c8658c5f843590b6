"""`block_int8`: the codes of `int8` in blocks of 32 columns of a row, of which those without a weight are left out.

`columns` names the blocks of a row that are stored, ascending (block c is columns 32 c .. 32 c + 31); those of row o
stand at pointers[o] .. pointers[o + 1] - 1. A product skips what is left out, so sparsity in blocks is speed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minigpt.encodings.base import ANY, Parts, Rows
from minigpt.encodings.grid import Grid, Mask, pad_columns
from minigpt.encodings.int8 import Int8
from minigpt.errors import EncodingError

WIDTH = 32


class BlockInt8(Int8):
    """The codes of `int8`, 8.5 bits a weight in the blocks that are stored."""

    name = "block_int8"
    part_dtypes = {"pointers": "<u4", "columns": "<u2", "codes": "|i1", "scales": "<f4"}
    sparse = True

    def part_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Where the blocks of each row begin, their columns, their codes, one scale per row."""
        return {"pointers": (shape[0] + 1,), "columns": (ANY,), "codes": (ANY, WIDTH), "scales": (shape[0],)}

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Follow all pointers and columns."""
        pointers, columns = parts["pointers"].astype(np.int64), parts["columns"].astype(np.int64)
        n_blocks, last = len(columns), -(-shape[1] // WIDTH) - 1
        if pointers[0] != 0 or (np.diff(pointers) < 0).any() or pointers[-1] != n_blocks:
            raise EncodingError(
                f"the pointers of a block_int8 matrix do not rise from 0 to {n_blocks}; make the file again"
            )
        if len(parts["codes"]) != n_blocks or columns.max(initial=0) > last:
            raise EncodingError(
                f"a block_int8 matrix of {n_blocks} blocks has codes for {len(parts['codes'])} and names block "
                f"{columns.max(initial=0)}, the last is {last}; make the file again"
            )
        first = np.zeros(n_blocks + 1, np.bool_)
        first[pointers] = True
        if (np.diff(columns)[~first[1:n_blocks]] <= 0).any():
            raise EncodingError("the blocks of a row of a block_int8 matrix are not ascending; make the file again")

    def pack(self, codes: NDArray[np.integer], grid: Grid, kept: Mask) -> Parts:
        """Store the blocks that hold a code which is kept and not zero; at least one, for no part may be empty."""
        blocks = pad_columns(np.where(kept, codes, 0).astype(np.int8), WIDTH).reshape(len(codes), -1, WIDTH)
        full: Mask = np.any(blocks, axis=2)  # [n_out, n_blocks of a row]
        full[0, 0] |= not full.any()
        return {
            "pointers": np.append(0, np.cumsum(full.sum(axis=1))).astype("<u4"),
            "columns": np.nonzero(full)[1].astype("<u2"),
            "codes": blocks[full],
            "scales": grid.scales[:, 0].astype("<f4"),
        }

    def codes(self, parts: Parts, n_in: int, rows: Rows) -> NDArray[np.int8]:
        """Put the empty blocks back: [n_rows, n_in]."""
        pointers = parts["pointers"].astype(np.int64)
        begins, counts = pointers[:-1][rows], np.diff(pointers)[rows]  # [n_rows]
        row = np.repeat(np.arange(len(counts)), counts)  # [n_blocks]
        block = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(len(row))
        full = np.zeros((len(counts), -(-n_in // WIDTH), WIDTH), np.int8)
        full[row, parts["columns"][block]] = parts["codes"][block]
        return full.reshape(len(counts), -1)[:, :n_in]
