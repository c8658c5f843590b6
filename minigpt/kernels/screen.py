"""Logits of which only the highest are exact: four bits of every weight say which rows can be among them.

Encodings of tables keep such a rough part of themselves: `int8_split` the upper halves of its codes, `f16_screened` and
`f32_screened` a copy in 4 bits. `screen` multiplies by it, which reads a half, a quarter or an eighth of the matrix;
`refine` then multiplies the rows that may matter in full. `reference.py` has the same in NumPy.
"""

from __future__ import annotations

import itertools
from typing import Any

from numba import njit
from numba.core import cgutils

from minigpt.kernels.elementwise import largest, nearest
from minigpt.kernels.entry import HELP, entry, float32, instruction, int32, int64, void
from minigpt.kernels.intrinsics import call_matmul, f32, i8, i16, i64, never_inline, square_root
from minigpt.kernels.split import constant
from minigpt.kernels.target import BYTE_PAIRS, BYTES, VECTOR
from minigpt.kernels.vectors import (
    F32,
    I8,
    I16,
    I32,
    ROWS,
    accumulators,
    add_nibbles,
    add_pairs,
    advance,
    load,
    prefetch,
    shuffle,
    store,
    sum_rows,
    vector_of,
    word,
)
from minigpt.layout import *

TOGETHER = 256  # rows whose bounds are compared at once
ROWS_AHEAD = 8  # of those made exact: they lie apart, and none is in a cache
AHEAD = 0 if BYTES else 2048  # bytes beyond those at hand that are asked for; with BYTES memory is the bound anyway
SIZE = 1 if BYTE_PAIRS else 2  # bytes of a rounded activation


@instruction(void, *[int64] * 5)
def dot_rough(b: Any, rough: Any, distance: Any, x: Any, n_blocks: Any, y: Any) -> None:
    """y[row] = sum of 4-bit code * x over n times COLUMNS columns, for ROWS rows that are `distance` bytes apart."""
    kind = vector_of(I8, VECTOR)
    rows = []
    for row in range(ROWS):
        begin = advance(b, rough, distance, row)
        totals = accumulators(b, vector_of(I32, VECTOR // 4), 2)
        with cgutils.for_range(b, n_blocks) as loop:
            codes, places = [], []
            for i in range(0, 64, VECTOR):
                at = advance(b, b.add(begin, b.mul(loop.index, word(64))), i)
                packed = load(b, at, kind)
                if AHEAD:
                    prefetch(b, advance(b, at, AHEAD))
                codes += [b.and_(packed, constant(kind, 15)), b.lshr(packed, constant(kind, 4))]
                start = advance(b, x, loop.index, SIZE * COLUMNS)
                places += [advance(b, start, column, SIZE) for column in (i, 64 + i)]
            _multiply(b, codes, places, totals)
        rows.append(b.sitofp(b.add(*(b.load(total) for total in totals)), vector_of(F32, VECTOR // 4)))
    store(b, sum_rows(b, rows), y)


def _multiply(b: Any, codes: list[Any], x: list[Any], totals: list[Any]) -> None:
    """Add the products of vectors of 4-bit codes, one to a byte, and the activations at addresses to int32 lanes."""
    n = VECTOR // 2
    if BYTE_PAIRS:
        values = [load(b, at, vector_of(I8, VECTOR)) for at in x]
        sums = add_nibbles(b, codes, values, [b.load(total) for total in totals])
        for value, total in zip(sums, totals, strict=True):
            b.store(value, total)
        return
    for part, at, total in zip(codes, x, itertools.cycle(totals), strict=False):
        for i in range(2):
            wide = b.zext(shuffle(b, part, part, [n * i + lane for lane in range(n)]), vector_of(I16, n))
            b.store(add_pairs(b, wide, load(b, advance(b, at, n * i, 2), wide.type), b.load(total)), total)


@njit(**HELP)
def round_activations(source, n_in, to):
    """Round n floats to int8, or int16 where bytes are not multiplied; return scale, sum, and how wrong products are.

    The third, times the step of a row's codes, is far more than its product can be wrong by: codes are off by 0.29
    steps as a rule, one up where another is down, so that a product is off by 0.29 |x|, and 2 |x| is seven times as
    much. The rounding of x adds its error times codes of 2.5 steps as a rule, 9 times 0.29.
    """
    never_inline()
    padded, x = (n_in + COLUMNS - 1) // COLUMNS * COLUMNS, f32(source)
    levels = float32(127) if BYTE_PAIRS else float32(min(32767, (2**31 - 1) // (15 * padded)))
    scale = max(largest(source, n_in, True), float32(1e-9)) / levels
    inverse, total, square, error = float32(1) / scale, int32(0), float32(0), float32(0)
    for i in range(n_in):
        code = nearest(x[i] * inverse)
        if BYTE_PAIRS:
            i8(to)[i] = code
        else:
            i16(to)[i] = code
        total = int32(total + code)
        off = x[i] - float32(code) * scale
        square += x[i] * x[i]
        error += off * off
    for i in range(n_in * SIZE, padded * SIZE):
        i8(to)[i] = 0
    return scale, float32(total), float32(2) * (square_root(square) + float32(9) * square_root(error))


@instruction(void, int64)
def ask(b: Any, address: Any) -> None:
    """Ask for a cache line."""
    prefetch(b, address)


@njit(**HELP)
def ask_lines(begin, n_bytes):
    """Ask for so many bytes."""
    for at in range(0, n_bytes, 64):
        ask(begin + at)


@njit(**HELP)
def ask_halves(w, row):
    """Ask for a row of `int8_split`."""
    n_bytes = (w[W_N_IN] + COLUMNS - 1) // COLUMNS * 64
    ask_lines(w[W_PART_0] + row * n_bytes, n_bytes)
    ask_lines(w[W_PART_1] + row * n_bytes, n_bytes)


def _ask_values(size: int) -> Any:
    """Return a function that asks for a row of values of so many bytes."""

    @njit(**HELP)
    def ask_values(w, row):
        n_bytes = w[W_N_IN] * size
        ask_lines(w[W_PART_0] + row * n_bytes, n_bytes)

    return ask_values


def _add(name: str, part: int, step: float, middle: float, ask_row: Any) -> None:
    """Register the entry points of an encoding with rough codes in a part, [n_out, n_in / 2], and scales in part 2.

    A weight is about (code - middle) * step * scale of its row.
    """

    @entry(9, name=f"screen_{name}")
    def screen(w, x, y, y_stride, n_tokens, row_begin, row_end, tops, widths):
        """Write rough products to y, as `matmul` writes exact ones, which are within step * scale * width of the row.

        Leaves the highest lower bound and the width of each token in `tops` and `widths`.
        """
        w, x = i64(w), i64(x)
        n_in = w[W_N_IN]
        n_blocks = (n_in + COLUMNS - 1) // COLUMNS
        codes = x[X_PANEL]
        bounds = codes + n_blocks * COLUMNS * 2
        for token in range(n_tokens):
            scale, total, width = round_activations(x[X_FLOAT] + token * x[X_FLOAT_STRIDE] * 4, n_in, codes)
            factor, width, top = float32(step) * scale, float32(step) * width, float32(-3e38)
            for begin in range(row_begin, row_end, TOGETHER):
                end = min(begin + TOGETHER, row_end)
                for row in range(begin, end, ROWS):
                    several = row + ROWS <= end  # fewer are done one by one, each ROWS times at once
                    for r in range(row, row + 1 if several else end):
                        to = y + (token * y_stride + r) * 4
                        products = to if several else bounds
                        distance = n_blocks * 64 if several else 0
                        dot_rough(w[part] + r * n_blocks * 64, distance, codes, n_blocks, products)
                        f32(to)[0] = f32(products)[0]
                values, lowest = f32(y + (token * y_stride + begin) * 4), f32(bounds)
                scales = f32(w[W_PART_2] + begin * 4)
                for r in range(end - begin):
                    values[r] = (values[r] - float32(middle) * total) * factor * scales[r]
                    lowest[r] = values[r] - scales[r] * width
                top = max(top, largest(bounds, end - begin, False))
            f32(tops)[token], f32(widths)[token] = top, width

    @entry(9, name=f"refine_{name}")
    def refine(w, x, y, y_stride, n_tokens, row_begin, row_end, limits, widths):
        """Make those products exact that may reach their token's limit; leave their number in `limits`.

        At most CHUNK_ROWS rows. The `matmul` of these encodings needs no scratch for few tokens: what is there stays.
        """
        matrix, w = w, i64(w)
        bounds = i64(x)[X_PANEL] + i64(x)[X_STRIDE] * 4
        chosen = i64(bounds + TOGETHER * 4)
        for token in range(n_tokens):
            limit, width, count = f32(limits)[token], f32(widths)[token], 0
            for begin in range(row_begin, row_end, TOGETHER):
                n = min(TOGETHER, row_end - begin)
                values, highest = f32(y + (token * y_stride + begin) * 4), f32(bounds)
                scales = f32(w[W_PART_2] + begin * 4)
                for r in range(n):
                    highest[r] = values[r] + scales[r] * width
                if largest(bounds, n, False) >= limit:
                    for r in range(n):
                        chosen[count] = begin + r
                        count += highest[r] >= limit
            for i in range(-ROWS_AHEAD, count):
                if i + ROWS_AHEAD < count:
                    ask_row(w, chosen[i + ROWS_AHEAD])
                if i >= 0:
                    call_matmul(w[W_MATMUL], (matrix, x, y, y_stride, n_tokens, chosen[i], chosen[i] + 1))
            f32(limits)[token] = float32(count)


_add("int8_split", W_PART_0, 16, 120.5 / 16, ask_halves)
_add("f16_screened", W_PART_1, 1, 7.5, _ask_values(2))
_add("f32_screened", W_PART_1, 1, 7.5, _ask_values(4))
