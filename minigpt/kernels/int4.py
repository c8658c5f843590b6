"""Matrices of 4-bit codes in groups of columns with a scale and a minimum each, times int8 activations."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.elementwise import largest, nearest
from minigpt.kernels.entry import HELP, add_encoding, float32, instruction, int32, int64, void
from minigpt.kernels.intrinsics import f32, half, i8, i64, never_inline, u8, u16
from minigpt.kernels.target import BYTE_PAIRS, INTEGERS, PANEL, PARTS, REGISTERS, UNIT
from minigpt.kernels.tiles import codes_by_tiles, matmul_of, panel_of_decoded
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
    multiply_add,
    prefetch,
    shuffle,
    store,
    sum_rows,
    vector_of,
    widen_half,
    word,
)
from minigpt.layout import *

# Rows side by side share their activations if registers suffice, but the processor does not foresee them all: memory
# is asked for beyond the next ones. One after the other they are a single stream, and steps can be longer.
SIDE, STEP, AHEAD = (ROWS, 2 * UNIT, 4096) if REGISTERS == 32 else (1, 4 * UNIT, 2048)


def _multiply_nibbles(b: Any, packed: Any, x: list[Any]) -> Any:
    """Return the products of packed int4 codes, bytes, with vectors of `quantize_in_32s`: 4 int32 for each 32."""
    n = packed.type.count
    lanes, words = vector_of(I32, n // 4), vector_of(I16, n // 2)
    constant = lambda kind, v: ir.Constant(kind, [v] * kind.count)  # noqa: E731
    shifted = lambda bits: b.lshr(b.bitcast(packed, words), constant(words, bits))  # noqa: E731
    total = ir.Constant(lanes, None)
    if BYTE_PAIRS:
        nibbles = [b.and_(b.bitcast(shifted(4 * i), packed.type), constant(packed.type, 15)) for i in (0, 1)]
        return add_nibbles(b, nibbles, x, [total])[0]
    for i, values in enumerate(x):  # a nibble of each word
        total = add_pairs(b, b.and_(shifted(4 * i), constant(words, 15)), b.bitcast(values, words), total)
    return total


def _order(count: int) -> list[int]:
    """Return the order in which so many scales stand in their vector.

    If there are as many as lanes, that of which a shuffle within 16 bytes spreads each, the cheapest there is.
    """
    if count < 4 * UNIT:
        return list(range(count))
    return [UNIT * i + lane for lane in range(UNIT) for i in range(4)]


@instruction(void, *[int64] * 3)
def order_scales(b: Any, scales: Any, n: Any, to: Any) -> None:
    """Copy n scales of activations as `dot` takes them."""
    whole = b.udiv(n, word(STEP))
    for count, begin, steps in ((STEP, word(0), whole), (1, b.mul(whole, word(STEP)), b.urem(n, word(STEP)))):
        with cgutils.for_range(b, steps) as loop:
            at = advance(b, b.mul(begin, word(4)), loop.index, 4 * count)
            some = load(b, b.add(scales, at), vector_of(F32, count), 4)
            store(b, shuffle(b, some, some, _order(count)), b.add(to, at))


def _dot_groups(group: int) -> Any:
    """Return `dot(codes, scales, minimums, distance, x, x_scales, sums, n, y)` of ROWS rows in groups of columns.

    y[row] = the sum over groups of scale * x_scale * sum(code * x) + minimum * sum, where x is the int8 activations
    of `quantize_in_32s` with sums and scales, these as `order_scales` leaves them, and n how many times 32 there are.
    The codes of a row are `distance` times 16 bytes before those of the next: n, or 0 for the same row again.
    """
    share = group // 32

    @instruction(void, *[int64] * 9)
    def dot(
        b: Any, codes: Any, scales: Any, minimums: Any, distance: Any, x: Any, x_scales: Any, sums: Any, n: Any, y: Any
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
            order = _order(count)
            spread = [i // share for i in range(count)]
            x_scale, total_x = (load(b, advance(b, p, first, 4), vector_of(F32, count), 4) for p in (x_scales, sums))
            factors = []
            for begin, total in zip(begins, totals, strict=True):
                at, halves = b.udiv(begin, word(share)), vector_of(I16, count // share)
                scale, lowest = (load(b, advance(b, p, at, 2), halves) for p in (scales, minimums))
                scale = widen_half(b, shuffle(b, scale, scale, [spread[i] for i in order]))
                factors.append(b.fmul(scale, x_scale))
                add(total, widen_half(b, shuffle(b, lowest, lowest, spread)), total_x)
            unit = min(UNIT, count)

            def read(address: Any) -> Any:
                """Load the codes or activations of a unit, zeros where a row has no more."""
                part = load(b, address, vector_of(I8, 16 * unit))
                return shuffle(b, part, ir.Constant(part.type, None), [min(i, 16 * unit) for i in range(16 * UNIT)])

            for i in range(0, count, unit):
                place = b.add(first, word(i))
                whole, rest = b.udiv(place, word(UNIT)), b.urem(place, word(UNIT))
                at = b.add(advance(b, x, whole, PARTS * 16 * UNIT), b.mul(rest, word(16)))
                values = [read(advance(b, at, 16 * UNIT * part)) for part in range(PARTS)]
                lanes = [order.index(min(i + j // 4, count - 1)) for j in range(4 * UNIT)]
                for begin, scale, total in zip(begins, factors, totals, strict=True):
                    address = advance(b, advance(b, codes, begin, 16), 16 * i)
                    prefetch(b, b.add(address, ahead))
                    products = b.sitofp(_multiply_nibbles(b, read(address), values), kind)
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
        store(b, sum_rows(b, [b.load(b.gep(results, [word(row)])) for row in range(ROWS)]), y)

    return dot


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
        x_scales, room = x[X_PANEL], x[X_STRIDE] // 32 * 4
        for token in range(n_tokens):
            order_scales(x[X_GROUP_SCALES] + token * room, n, x_scales + token * room)
        several = row_end - row_begin >= ROWS
        for begin in range(row_begin, row_end, ROWS if several else 1):
            # the last rows overlap those before; fewer than ROWS are done one by one, each ROWS times at once
            row, distance = (min(begin, row_end - ROWS), n) if several else (begin, 0)
            codes, first = w[W_PART_0] + row * n * 16, row * n_groups * 2
            scales, minimums = w[W_PART_1] + first, w[W_PART_2] + first
            for token in range(n_tokens):
                source, sums = x[X_CODES] + token * x[X_STRIDE] * 2, x[X_SUMS] + token * room
                to = y + (token * y_stride + row) * 4
                products = to if several else x[X_TILE]
                dot(codes, scales, minimums, distance, source, x_scales + token * room, sums, n, products)
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
