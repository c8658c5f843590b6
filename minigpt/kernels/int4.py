"""Matrices of 4-bit codes in groups of columns with a scale and a minimum each, times int16 activations."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.elementwise import largest, nearest
from minigpt.kernels.entry import HELP, add_encoding, float32, instruction, int32, int64, void
from minigpt.kernels.intrinsics import f32, half, i8, i64, never_inline, u8, u16
from minigpt.kernels.target import BYTES, INTEGERS, PANEL, REGISTERS, VECTOR
from minigpt.kernels.tiles import codes_by_tiles, matmul_of, panel_of_decoded
from minigpt.kernels.vectors import (
    F32,
    I8,
    I16,
    I32,
    ROWS,
    accumulators,
    add_pairs,
    advance,
    broadcast,
    load,
    multiply_add,
    multiply_bytes,
    prefetch,
    shuffle,
    store,
    sum_rows,
    vector_of,
    widen_half,
    word,
)
from minigpt.layout import *

UNIT = VECTOR // 16  # groups of int4, 16 bytes each, that fill a vector
# Rows side by side share their activations if registers suffice, but the processor does not foresee them all: memory
# is asked for beyond the next ones. One after the other they are a single stream, and steps can be longer.
SIDE, STEP, AHEAD = (ROWS, 2 * UNIT, 4096) if REGISTERS == 32 else (1, 4 * UNIT, 2048)


def _multiply_nibbles(b: Any, packed: Any, x: list[Any]) -> Any:
    """Return the products of packed int4 codes, bytes, with the four vectors of `order`: 4 int32 for a group."""
    n = packed.type.count
    lanes, words = vector_of(I32, n // 4), vector_of(I16, n // 2)
    constant = lambda kind, v: ir.Constant(kind, [v] * kind.count)  # noqa: E731
    shifted = lambda bits: b.lshr(b.bitcast(packed, words), constant(words, bits))  # noqa: E731
    total = ir.Constant(lanes, None)
    if BYTES:  # upper and lower bytes of the activations apart
        low, high = (b.and_(b.bitcast(shifted(i), packed.type), constant(packed.type, 15)) for i in (0, 4))
        total = multiply_bytes(b, high, x[1], multiply_bytes(b, low, x[0], total))
        total = b.shl(total, constant(lanes, 8))
        return multiply_bytes(b, high, x[3], multiply_bytes(b, low, x[2], total))
    for i, values in enumerate(x):  # a nibble of each word
        nibbles = b.and_(shifted(4 * i), constant(words, 15))
        total = add_pairs(b, nibbles, b.bitcast(values, words), total)
    return total


def _dot_groups(group: int) -> Any:
    """Return `dot(codes, scales, minimums, distance, x, sums, n, factor, y)` of ROWS rows in groups of columns.

    y[row] = factor * the sum over groups of scale * sum(code * x) + minimum * sum(x), where x is the int16 activations
    as `order` leaves them, sums those of each 32, and n how many 32 there are. The codes of a row are
    `distance` times 16 bytes before those of the next: n, or 0 for the same row again.
    """
    share = group // 32

    @instruction(void, *[int64] * 7, float32, int64)
    def dot(
        b: Any,
        codes: Any,
        scales: Any,
        minimums: Any,
        distance: Any,
        x: Any,
        sums: Any,
        n: Any,
        factor: Any,
        y: Any,
    ) -> None:
        kind = vector_of(F32, 4 * UNIT)
        totals = accumulators(b, kind, SIDE)
        results = cgutils.alloca_once(b, kind, size=ROWS)
        ahead = word(AHEAD) if SIDE == 1 else b.add(b.mul(distance, word(16 * SIDE)), word(AHEAD))

        def add(total: Any, v: Any, w: Any) -> None:
            """Add v * w, of few lanes perhaps, to a total."""
            zeros, lanes = ir.Constant(v.type, None), [min(i, v.type.count) for i in range(kind.count)]
            v, w = (shuffle(b, u, zeros, lanes) if v.type.count < kind.count else u for u in (v, w))
            b.store(multiply_add(b, v, w, b.load(total)), total)

        def step(row: Any, first: Any, count: int) -> None:
            """Do `count` times 32 columns of SIDE rows."""
            begins = [b.add(first, b.mul(distance, advance(b, row, i))) for i in range(SIDE)]
            order = list(range(count // share))  # of the scales in their vector
            if share == 1 and count == 4 * UNIT:  # a shuffle within 16 bytes spreads them, the cheapest there is
                order = [UNIT * i + lane for lane in range(UNIT) for i in range(4)]
            factors = []
            for begin, total in zip(begins, totals, strict=True):
                at, kind = b.udiv(begin, word(share)), vector_of(I16, count // share)
                scale, lowest = (load(b, advance(b, p, at, 2), kind) for p in (scales, minimums))
                factors.append(widen_half(b, shuffle(b, scale, scale, order)))
                lowest = widen_half(b, lowest)
                lowest = shuffle(b, lowest, lowest, [i // share for i in range(count)])
                add(total, lowest, load(b, advance(b, sums, first, 4), lowest.type))
            unit = UNIT if count >= UNIT else 1
            kind = vector_of(I8, 16 * unit)
            for i in range(0, count, unit):
                at = advance(b, advance(b, x, first, 64), 64 * i)
                values = [load(b, advance(b, at, 16 * unit * part), kind) for part in range(4)]
                lanes = [order.index((i + j // 4) // share) for j in range(4 * unit)]
                for begin, scale, total in zip(begins, factors, totals, strict=True):
                    address = advance(b, advance(b, codes, begin, 16), 16 * i)
                    prefetch(b, b.add(address, ahead))
                    products = b.sitofp(_multiply_nibbles(b, load(b, address, kind), values), vector_of(F32, 4 * unit))
                    add(total, products, shuffle(b, scale, scale, lanes))

        with cgutils.for_range(b, word(ROWS // SIDE)) as rows:
            row = b.mul(rows.index, word(SIDE))
            for total in totals:
                b.store(ir.Constant(kind, None), total)
            done = word(0)
            for count in sorted({max(STEP, share), max(UNIT, share), share}, reverse=True):
                steps = b.udiv(b.sub(n, done), word(count))
                with cgutils.for_range(b, steps) as loop:
                    step(row, b.add(done, b.mul(loop.index, word(count))), count)
                done = b.add(done, b.mul(steps, word(count)))
            for i, total in enumerate(totals):
                b.store(b.load(total), b.gep(results, [advance(b, row, i)]))
        result = sum_rows(b, [b.load(b.gep(results, [word(row)])) for row in range(ROWS)])
        store(b, b.fmul(result, broadcast(b, factor, result.type)), y)

    return dot


@instruction(void, int64, int64, int64)
def order(b: Any, x: Any, y: Any, n: Any) -> None:
    """Copy n times 32 int16 activations in the order in which `dot` takes them: four vectors for UNIT times 32.

    With BYTES they are the upper bytes, rounded, of columns 0..15 and 16..31 of each 32, then the lower bytes.
    Without, the columns of the four nibbles of a word: 0, 2, .. 14, then 16, .. 30, then the odd ones.
    """
    done = word(0)
    for unit in sorted({UNIT, 1}, reverse=True):
        steps = b.udiv(b.sub(n, done), word(unit))
        with cgutils.for_range(b, steps) as loop:
            start = b.mul(b.add(done, b.mul(loop.index, word(unit))), word(64))
            values = load(b, b.add(x, start), vector_of(I16, 32 * unit))
            if BYTES:
                split = vector_of(I8, 64 * unit)
                upper = b.bitcast(b.add(values, ir.Constant(values.type, [128] * 32 * unit)), split)
                lower = b.bitcast(values, split)
                halves = ((upper, 1), (lower, 0))
                take = [(source, 2 * first + byte, 2, 16) for source, byte in halves for first in (0, 16)]
                size = 64
            else:
                take = [(values, first, 2, 8) for first in (0, 16, 1, 17)]
                size = 32
            for i, (source, first, stride, n_lanes) in enumerate(take):
                lanes = [size * g + first + stride * j for g in range(unit) for j in range(n_lanes)]
                store(b, shuffle(b, source, source, lanes), advance(b, b.add(y, start), 16 * unit * i))
        done = b.add(done, b.mul(steps, word(unit)))


def _rounded_panel(decode: Any) -> Any:
    """Return `panel` of decoded rows rounded to int8 with one scale a row, far below int4's own error.

    Codes, int8 [n_rows, n_in], their scales and one decoded row follow the panel in the scratch.
    """

    @njit(**HELP)
    def round_rows(w, row, n_rows, n_in, codes, scales):
        never_inline()
        values = scales + PANEL * 4
        for r in range(n_rows):
            decode(w, row + r, values, 1)
            scale = max(largest(values, n_in, True), float32(1e-9)) / float32(127)
            f32(scales)[r] = scale
            source, to, inverse = f32(values), i8(codes + r * n_in), float32(1) / scale
            for i in range(n_in):
                to[i] = nearest(source[i] * inverse)

    @njit(**HELP)
    def panel(w, x, y, y_stride, n_tokens, row, n_rows):
        n_in, codes = i64(w)[W_N_IN], i64(x)[X_PANEL] + 2 * PANEL * i64(x)[X_STRIDE]
        scales = (codes + PANEL * n_in + 63) // 64 * 64
        round_rows(w, row, n_rows, n_in, codes, scales)
        codes_by_tiles(codes, n_in, x, y, y_stride, n_tokens, row, n_rows, scales, n_in)

    return panel


def _add_groups(name: str, group: int) -> None:
    """Register the kernels for groups of so many columns; a row is padded to whole groups."""
    share, dot = group // 32, _dot_groups(group)

    @njit(**HELP)
    def few(w, x, y, y_stride, n_tokens, row_begin, row_end):
        w, x = i64(w), i64(x)
        n_groups = (w[W_N_IN] + group - 1) // group
        n = n_groups * share
        ordered, x_sums, x_bytes, x_scales = x[X_PANEL], x[X_SUMS], x[X_STRIDE] * 2, f32(x[X_SCALES])
        for token in range(n_tokens):
            order(x[X_CODES] + token * x_bytes, ordered + token * x_bytes, n)
        several = row_end - row_begin >= ROWS
        for begin in range(row_begin, row_end, ROWS if several else 1):
            # the last rows overlap those before; fewer than ROWS are done one by one, each ROWS times at once
            row, distance = (min(begin, row_end - ROWS), n) if several else (begin, 0)
            codes, first = w[W_PART_0] + row * n * 16, row * n_groups * 2
            scales, minimums = w[W_PART_1] + first, w[W_PART_2] + first
            for token in range(n_tokens):
                source, sums = ordered + token * x_bytes, x_sums + token * x_bytes // 16
                to = y + (token * y_stride + row) * 4
                products = to if several else x[X_TILE]
                dot(codes, scales, minimums, distance, source, sums, n, x_scales[token], products)
                f32(to)[0] = f32(products)[0]

    @njit(**HELP)
    def decode(w, row, y, step):
        """Decode a row into the floats y[0], y[step], y[2 step], ..."""
        w, y = i64(w), f32(y)
        n_in = w[W_N_IN]
        n_groups = (n_in + group - 1) // group
        scales, minimums = u16(w[W_PART_1] + row * n_groups * 2), u16(w[W_PART_2] + row * n_groups * 2)
        for i in range((n_in + 31) // 32):
            codes, begin = u8(w[W_PART_0] + (row * n_groups * share + i) * 16), i * 32
            scale, minimum = half(scales[i // share]), half(minimums[i // share])
            if begin + 32 <= n_in:
                for j in range(16):
                    y[(begin + j) * step] = float32(int32(codes[j]) & int32(15)) * scale + minimum
                    y[(begin + 16 + j) * step] = float32(int32(codes[j]) >> int32(4)) * scale + minimum
            else:
                for j in range(n_in - begin):
                    code = codes[j % 16] >> (j // 16 * 4) & 15
                    y[(begin + j) * step] = float32(code) * scale + minimum

    def rows(w, row, y):
        decode(w, row, y, 1)

    panel = _rounded_panel(decode) if INTEGERS else panel_of_decoded(decode)
    add_encoding(name, matmul_of(few, panel), rows)


# Parts: codes [n_out, n_in / 2], scales and minimums f16 [n_out, n_in / group]
_add_groups("int4", 32)
_add_groups("int4_g64", 64)
_add_groups("int4_g128", 128)
