"""Matrices of int8 codes times int16 activations: one scale a row, or one for a group of columns."""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.entry import EXACT, HELP, INLINE, add_encoding, float32, instruction, int32, int64
from minigpt.kernels.intrinsics import f32, half, i8, i16, i64, u16
from minigpt.kernels.target import PANEL, REGISTERS, VECTOR
from minigpt.kernels.tiles import codes_by_tiles, matmul_of, panel_of_decoded
from minigpt.kernels.vectors import (
    F32,
    I8,
    I16,
    I32,
    accumulators,
    add_pairs,
    advance,
    broadcast,
    load,
    multiply_add,
    prefetch_pages,
    sum_lanes,
    vector_of,
    widen_half,
    word,
)
from minigpt.layout import *

WIDTH = VECTOR // 2  # codes that become a vector of int16


UNROLLED = 4  # accumulators, which hide the latency of the multiply-add


def _dot(ahead: bool) -> Any:
    """Return `dot(w, x, n)`: the int32 sum of w[i] * x[i], int8 times int16, over the whole times WIDTH in n."""

    @instruction(int32, int64, int64, int64)
    def dot(b: Any, w: Any, x: Any, n: Any) -> Any:
        totals = accumulators(b, vector_of(I32, WIDTH // 2), UNROLLED)

        def step(start: Any, total: Any) -> None:
            codes = b.sext(load(b, b.add(w, start), vector_of(I8, WIDTH)), vector_of(I16, WIDTH))
            activations = load(b, advance(b, x, start, 2), codes.type)
            b.store(add_pairs(b, codes, activations, b.load(total)), total)

        blocks = b.udiv(n, word(WIDTH * UNROLLED))
        with cgutils.for_range(b, blocks) as loop:
            start = b.mul(loop.index, word(WIDTH * UNROLLED))
            if ahead:
                prefetch_pages(b, b.add(w, start))
            for i, total in enumerate(totals):
                step(b.add(start, word(i * WIDTH)), total)
        rest = b.mul(blocks, word(UNROLLED))
        with cgutils.for_range(b, b.sub(b.udiv(n, word(WIDTH)), rest)) as loop:
            step(b.mul(b.add(loop.index, rest), word(WIDTH)), totals[0])
        first, *others = (b.load(total) for total in totals)
        return sum_lanes(b, reduce(b.add, others, first))

    return dot


dot_cached = _dot(ahead=False)
dot_streamed = _dot(ahead=REGISTERS == 16)  # AVX-512 comes close to what memory gives by itself; ARM was not measured


def row_by_row(read: Any, dot: Any) -> Any:
    """Return `few` (see `matmul_of`) of integers.

    `read(w, row, scratch)` finds or makes what `dot(line, codes, n_in)` wants of a row; codes are a token's int16.
    """

    @njit(**EXACT)  # scales are applied in the same order whatever `dot` is: sparse and dense agree to the bit
    def few(w, x, y, y_stride, n_tokens, row_begin, row_end):
        n_in, x = i64(w)[W_N_IN], i64(x)
        codes, row_bytes, scales, scratch = x[X_CODES], x[X_STRIDE] * 2, f32(x[X_SCALES]), x[X_PANEL]
        for row in range(row_begin, row_end):
            line = read(w, row, scratch)
            for token in range(n_tokens):
                f32(y)[token * y_stride + row] = dot(line, codes + token * row_bytes, n_in) * scales[token]

    return few


# One scale a row. `unpack(w, row, n_rows, scratch)` returns where the codes of rows begin, in the file or in the
# scratch, and how far a row is from the next; `part` is the field of the descriptor that has the scales.


def codes_by_row(unpack: Any, part: int, dot_i8: Any) -> Any:
    """Return `few`; dot_i8 is `dot_streamed` where codes lie in the file, `dot_cached` where they are unpacked."""

    @njit(**INLINE)
    def read(w, row, scratch):
        codes, _ = unpack(w, row, 1, scratch)
        return codes, f32(i64(w)[part])[row]

    @njit(**INLINE)
    def dot(line, x, n_in):
        codes, scale = line
        total = dot_i8(codes, x, n_in)
        for i in range(n_in // WIDTH * WIDTH, n_in):
            total = int32(total + int32(int32(i8(codes)[i]) * int32(i16(x)[i])))
        return float32(total) * scale

    return row_by_row(read, dot)


def codes_by_panel(unpack: Any, part: int) -> Any:
    """Return `panel`; the unpacked codes follow the panel in the scratch."""

    @njit(**HELP)
    def panel(w, x, y, y_stride, n_tokens, row, n_rows):
        codes, row_bytes = unpack(w, row, n_rows, i64(x)[X_PANEL] + 2 * PANEL * i64(x)[X_STRIDE])
        scales = i64(w)[part] + row * 4
        codes_by_tiles(codes, row_bytes, x, y, y_stride, n_tokens, row, n_rows, scales, i64(w)[W_N_IN])

    return panel


@njit(**HELP)
def unpack_int8(w, row, n_rows, scratch):
    """Nothing to unpack."""
    n_in = i64(w)[W_N_IN]
    return i64(w)[W_PART_0] + row * n_in, n_in


def rows_int8(w, row, y):
    """Decode one row into float32."""
    w, y = i64(w), f32(y)
    codes, scale = i8(w[W_PART_0] + row * w[W_N_IN]), f32(w[W_PART_1])[row]
    for i in range(w[W_N_IN]):
        y[i] = float32(codes[i]) * scale


# Parts: codes [n_out, n_in], scales [n_out]
add_encoding(
    "int8",
    matmul_of(codes_by_row(unpack_int8, W_PART_1, dot_streamed), codes_by_panel(unpack_int8, W_PART_1)),
    rows_int8,
)


# A scale for each group of columns. Tiles are of floats: one scale a row would lose what the groups are for.


def _dot_groups(group: int) -> Any:
    """Return `dot(w, scales, x, n_groups)`: the float32 sum of scale * sum(w * x) over groups of int8 times int16."""

    @instruction(float32, *[int64] * 4)
    def dot(b: Any, w: Any, scales: Any, x: Any, n_groups: Any) -> Any:
        (total,) = accumulators(b, vector_of(F32, WIDTH // 2), 1)
        with cgutils.for_range(b, n_groups) as loop:
            products = ir.Constant(vector_of(I32, WIDTH // 2), None)
            for i in range(0, group, WIDTH):
                start = advance(b, b.mul(loop.index, word(group)), i)
                codes = b.sext(load(b, b.add(w, start), vector_of(I8, WIDTH)), vector_of(I16, WIDTH))
                products = add_pairs(b, codes, load(b, advance(b, x, start, 2), codes.type), products)
            products = b.sitofp(products, vector_of(F32, WIDTH // 2))
            scale = widen_half(b, load(b, advance(b, scales, loop.index, 2), I16))
            b.store(multiply_add(b, products, broadcast(b, scale, products.type), b.load(total)), total)
        return sum_lanes(b, b.load(total))

    return dot


def _add_groups(group: int) -> None:
    """Register the kernels for groups of so many columns; the codes of a row are padded to whole groups."""
    dot_groups = _dot_groups(group)

    @njit(**INLINE)
    def read(w, row, scratch):
        w = i64(w)
        n_groups = (w[W_N_IN] + group - 1) // group
        return w[W_PART_0] + row * n_groups * group, w[W_PART_1] + row * n_groups * 2

    @njit(**INLINE)
    def dot(line, x, n_in):
        codes, scales = line
        return dot_groups(codes, scales, x, (n_in + group - 1) // group)

    @njit(**HELP)
    def decode(w, row, y, step):
        codes, scales = read(w, row, 0)
        codes, scales, y, n_in = i8(codes), u16(scales), f32(y), i64(w)[W_N_IN]
        for begin in range(0, n_in, group):
            scale = half(scales[begin // group])
            for i in range(begin, min(begin + group, n_in)):
                y[i * step] = float32(codes[i]) * scale

    def rows(w, row, y):
        decode(w, row, y, 1)

    add_encoding(f"int8_g{group}", matmul_of(row_by_row(read, dot), panel_of_decoded(decode)), rows)


# Parts: codes [n_out, n_in], scales f16 [n_out, n_in / group]
for _group in (32, 64, 128):
    _add_groups(_group)
