"""Matrices of int8 codes whose upper and lower halves are kept apart: products are those of `int8`, bit by bit.

`screen.py` multiplies by the upper halves alone.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.entry import HELP, INLINE, add_encoding, float32, instruction, int32, int64, void
from minigpt.kernels.int8 import codes_by_panel, row_by_row
from minigpt.kernels.intrinsics import f32, i64, u8
from minigpt.kernels.target import VECTOR
from minigpt.kernels.tiles import matmul_of
from minigpt.kernels.vectors import (
    I8,
    I16,
    I32,
    accumulators,
    add_pairs,
    advance,
    load,
    shuffle,
    store,
    sum_lanes,
    vector_of,
    word,
)
from minigpt.layout import *


def constant(kind: Any, value: int) -> Any:
    """Return a vector of the same integer in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def _whole(b: Any, upper: Any, lower: Any, at: Any) -> tuple[Any, Any]:
    """Load halves and put them together: int8 codes of VECTOR columns, and of those 64 columns further on."""
    four, low, high, sign = (constant(vector_of(I8, VECTOR), v) for v in (4, 15, 240, 128))
    u, v = (load(b, b.add(half, at), sign.type) for half in (upper, lower))
    first = b.or_(b.shl(b.and_(u, low), four), b.and_(v, low))
    second = b.or_(b.and_(u, high), b.lshr(v, four))
    return b.xor(first, sign), b.xor(second, sign)


@instruction(void, *[int64] * 4)
def join(b: Any, upper: Any, lower: Any, n_blocks: Any, codes: Any) -> None:
    """Put the halves of n times COLUMNS codes together."""
    with cgutils.for_range(b, n_blocks) as loop:
        for i in range(0, 64, VECTOR):
            both = _whole(b, upper, lower, advance(b, b.mul(loop.index, word(64)), i))
            to = advance(b, b.add(codes, b.mul(loop.index, word(COLUMNS))), i)
            for j, part in enumerate(both):
                store(b, part, advance(b, to, 64 * j))


@instruction(int32, *[int64] * 4)
def dot_split(b: Any, upper: Any, lower: Any, x: Any, n_blocks: Any) -> Any:
    """Return the int32 sum of code * x over n times COLUMNS codes, int8 times int16."""
    n = VECTOR // 2
    totals = accumulators(b, vector_of(I32, n // 2), 4)
    with cgutils.for_range(b, n_blocks) as loop:
        for i in range(0, 64, VECTOR):
            both = _whole(b, upper, lower, advance(b, b.mul(loop.index, word(64)), i))
            for j, total in enumerate(totals):
                codes, column = both[j // 2], i + j // 2 * 64 + j % 2 * n
                part = shuffle(b, codes, codes, [j % 2 * n + lane for lane in range(n)])
                at = advance(b, advance(b, x, loop.index, 2 * COLUMNS), column, 2)
                codes, activations = b.sext(part, vector_of(I16, n)), load(b, at, vector_of(I16, n))
                b.store(add_pairs(b, codes, activations, b.load(total)), total)
    first, *others = (b.load(total) for total in totals)
    return sum_lanes(b, reduce(b.add, others, first))


@njit(**HELP)
def unpack_split(w, row, n_rows, scratch):
    """Put the codes of rows together."""
    w = i64(w)
    n_blocks = (w[W_N_IN] + COLUMNS - 1) // COLUMNS
    for r in range(n_rows):
        half = (row + r) * n_blocks * 64
        join(w[W_PART_0] + half, w[W_PART_1] + half, n_blocks, scratch + r * n_blocks * COLUMNS)
    return scratch, n_blocks * COLUMNS


def rows_int8_split(w, row, y):
    """Decode one row into float32."""
    w, y = i64(w), f32(y)
    n_in, scale = w[W_N_IN], f32(w[W_PART_2])[row]
    half = row * ((n_in + COLUMNS - 1) // COLUMNS) * 64
    upper, lower = u8(w[W_PART_0] + half), u8(w[W_PART_1] + half)
    for i in range(n_in):
        byte, shift = i // COLUMNS * 64 + i % 64, i % COLUMNS // 64 * 4
        code = (int32(upper[byte]) >> shift & 15) * 16 + (int32(lower[byte]) >> shift & 15) - 128
        y[i] = float32(code) * scale


@njit(**INLINE)
def read_split(w, row, scratch):
    """Return addresses of the halves and the scale."""
    w = i64(w)
    half = row * ((w[W_N_IN] + COLUMNS - 1) // COLUMNS) * 64
    return w[W_PART_0] + half, w[W_PART_1] + half, f32(w[W_PART_2])[row]


@njit(**INLINE)
def dot_row_of_halves(line, x, n_in):
    """Multiply; x is 0 in the columns that a row is padded with."""
    upper, lower, scale = line
    return float32(dot_split(upper, lower, x, (n_in + COLUMNS - 1) // COLUMNS)) * scale


# Parts: upper and lower [n_out, n_in / 2], scales [n_out]
_matmul = matmul_of(row_by_row(read_split, dot_row_of_halves), codes_by_panel(unpack_split, W_PART_2))
add_encoding("int8_split", _matmul, rows_int8_split)
