"""Matrices of floats: f32 and f16, which is widened as it streams by."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from numba import njit
from numba.core import cgutils

from minigpt.kernels.entry import HELP, add_encoding, float32, instruction, int64
from minigpt.kernels.intrinsics import f32, half, i64, never_inline, u16
from minigpt.kernels.target import LANES, PANEL
from minigpt.kernels.tiles import floats_by_tiles, matmul_of, pack_squares_f16, pack_squares_f32
from minigpt.kernels.vectors import (
    F32,
    I16,
    accumulators,
    advance,
    load,
    multiply_add,
    prefetch,
    sum_lanes,
    vector_of,
    widen_half,
    word,
)
from minigpt.layout import *

SUMS = 4  # vectors of products that are added up side by side: what a multiply-add takes is hidden
STEP = SUMS * LANES  # columns


def _dot(element: Any, size: int, widen: Callable[[Any, Any], Any], ahead: int) -> Any:
    """Return `dot(row, x, n)`: the float32 sum of row[i] * x[i] over the whole times STEP in n.

    Memory is asked for so many bytes ahead, if any, twice a cache line: asked once, fewer lines came in time.
    """

    @instruction(float32, *[int64] * 3)
    def dot(b: Any, row: Any, x: Any, n: Any) -> Any:
        totals = accumulators(b, vector_of(F32, LANES), SUMS)
        with cgutils.for_range(b, b.udiv(n, word(STEP))) as loop:
            first = b.mul(loop.index, word(STEP))
            values, factors = advance(b, row, first, size), advance(b, x, first, 4)
            for byte in range(0, STEP * size if ahead else 0, 32):
                prefetch(b, advance(b, values, ahead + byte))
            for i, total in enumerate(totals):
                value = widen(b, load(b, advance(b, values, i * LANES, size), vector_of(element, LANES)))
                factor = load(b, advance(b, factors, i * LANES, 4), vector_of(F32, LANES), 4)
                b.store(multiply_add(b, value, factor, b.load(total)), total)
        return sum_lanes(b, reduce(b.fadd, [b.load(total) for total in totals]))

    return dot


def _packing(pointer: Any, widen: Any, size: int, pack_squares: Any) -> Any:
    """Return `pack(values, n_in, n_rows, panel)`, which spreads rows over lanes: panel[i, row] = values[row, i]."""

    @njit(**HELP)
    def pack(values, n_in, n_rows, panel):
        never_inline()
        done = 0
        if n_rows == PANEL:
            pack_squares(values, n_in * size, n_in, panel)
            done = n_in // LANES * LANES
        values, panel = pointer(values), f32(panel)
        for r in range(n_rows):
            for i in range(done, n_in):
                panel[i * PANEL + r] = widen(values[r * n_in + i])

    return pack


def _add_floats(name: str, pointer: Any, widen: Any, size: int, pack: Any, dot: Any) -> None:
    """Register the kernels of plain values [n_out, n_in] of so many bytes."""

    @njit(**HELP)
    def few(w, x, y, y_stride, n_tokens, row_begin, row_end):
        w, x = i64(w), i64(x)
        n_in, matrix = w[W_N_IN], w[W_PART_0]
        x_floats, x_bytes = x[X_FLOAT], x[X_FLOAT_STRIDE] * 4
        for row in range(row_begin, row_end):
            values = matrix + row * n_in * size
            for token in range(n_tokens):
                source = x_floats + token * x_bytes
                total = dot(values, source, n_in)
                for i in range(n_in // STEP * STEP, n_in):
                    total += widen(pointer(values)[i]) * f32(source)[i]
                f32(y)[token * y_stride + row] = total

    @njit(**HELP)
    def panel(w, x, y, y_stride, n_tokens, row, n_rows):
        n_in = i64(w)[W_N_IN]
        pack(i64(w)[W_PART_0] + row * n_in * size, n_in, n_rows, i64(x)[X_PANEL])
        floats_by_tiles(x, y, y_stride, n_tokens, row, n_rows, 0, n_in)

    def rows(w, row, y):
        w, y = i64(w), f32(y)
        values = pointer(w[W_PART_0] + row * w[W_N_IN] * size)
        for i in range(w[W_N_IN]):
            y[i] = widen(values[i])

    add_encoding(name, matmul_of(few, panel), rows)


@instruction(float32, float32)
def as_it_is(b: Any, value: Any) -> Any:
    """Return a float32, which needs no widening."""
    return value


pack_f32 = _packing(f32, as_it_is, 4, pack_squares_f32)
pack_f16 = _packing(u16, half, 2, pack_squares_f16)
# The processor itself looks far enough ahead of f32; widening f16 takes the room that it does so with
dot_f32 = _dot(F32, 4, lambda b, value: value, ahead=0)
dot_f16 = _dot(I16, 2, widen_half, ahead=1280)
for _screened in ("", "_screened"):
    _add_floats(f"f32{_screened}", f32, as_it_is, 4, pack_f32, dot_f32)
    _add_floats(f"f16{_screened}", u16, half, 2, pack_f16, dot_f16)
