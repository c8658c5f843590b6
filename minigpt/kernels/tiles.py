"""A matrix times many tokens: PANEL rows are unpacked once, spread over the lanes, and multiplied by TILE tokens each.

Also the frame that the kernels of all encodings share. A panel lies in the scratch of the thread's activation record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.entry import HELP, INLINE, instruction, int64, void
from minigpt.kernels.intrinsics import f32, i8, i16, i64, never_inline, u8
from minigpt.kernels.target import BYTE_PAIRS, GROUP, LANES, OFFSET, PANEL, TILE, VECTOR, X86
from minigpt.kernels.vectors import (
    F32,
    I8,
    I16,
    I32,
    accumulators,
    add_pairs,
    advance,
    broadcast,
    in_pairs,
    load,
    multiply_add,
    multiply_bytes,
    shuffle,
    store,
    vector_of,
    widen_half,
    word,
)
from minigpt.layout import *


def matmul_of(few: Any, panel: Any) -> Callable[..., Any]:
    """Return the entry point `matmul` of an encoding.

    Few tokens: `few`, of the same arguments, lets the weights stream by once, row by row, each row times every token
    while it is in the L1 cache. TILE tokens or more: `panel(w, x, y, y_stride, n_tokens, row, n_rows)` does up to
    PANEL rows.
    """

    @njit(**HELP)
    def many(w, x, y, y_stride, n_tokens, row_begin, row_end):
        for row in range(row_begin, row_end, PANEL):
            panel(w, x, y, y_stride, n_tokens, row, min(PANEL, row_end - row))

    def matmul(w, x, y, y_stride, n_tokens, row_begin, row_end):
        if n_tokens < TILE:
            few(w, x, y, y_stride, n_tokens, row_begin, row_end)
        else:
            many(w, x, y, y_stride, n_tokens, row_begin, row_end)

    return matmul


# Tiles


def _multiply_tile(b: Any, factors: Any, totals: Any, line: Any, multiply: Callable[..., Any]) -> None:
    """Add PANEL rows of an unpacked matrix times some tokens to totals[token][half of the panel].

    Each of n steps takes one line of the panel (lane = row) and one word of each token, which is broadcast:
    2 multiply-adds a token for 2 loads and one a token, and no sum across lanes at the end. A word is 4 bytes: a
    float32, two int16 or four int8. Strides are in bytes.
    """
    panel, panel_stride, x, x_stride, n = factors
    unit = b.load(totals[0][0]).type.element
    lanes = vector_of(unit, LANES)
    tokens = [advance(b, x, x_stride, t) for t in range(len(totals))]
    with cgutils.for_range(b, n) as loop:
        at = b.add(panel, b.mul(loop.index, panel_stride))
        rows = [load(b, advance(b, at, VECTOR * i), line, 4) for i in range(2)]
        for token, sums in zip(tokens, totals, strict=True):
            spread = b.bitcast(broadcast(b, load(b, advance(b, token, loop.index, 4), unit, 4), lanes), line)
            for row, total in zip(rows, sums, strict=True):
                b.store(multiply(b, row, spread, b.load(total)), total)


def _tile(unit: Any, line: Any, multiply: Callable[..., Any], finish: Callable[..., Any]) -> Any:
    """Return `tile(panel, panel_stride, x, x_stride, n, y, y_stride, scales, row_scales)`: y[token, row] = products.

    `finish(b, total, scale, row_scale)` makes floats of a vector of sums; the last two are functions that load the
    scale of the token, spread over the lanes, and those of the rows. Without them their addresses do not matter.
    """
    floats = vector_of(F32, LANES)

    @instruction(void, *[int64] * 9)
    def tile(
        b: Any,
        panel: Any,
        panel_stride: Any,
        x: Any,
        x_stride: Any,
        n: Any,
        y: Any,
        y_stride: Any,
        scales: Any,
        row_scales: Any,
    ) -> None:
        totals = [accumulators(b, vector_of(unit, LANES), 2) for _ in range(TILE)]
        _multiply_tile(b, (panel, panel_stride, x, x_stride, n), totals, line, multiply)
        for t, halves in enumerate(totals):
            for i, total in enumerate(halves):
                value = finish(
                    b,
                    b.load(total),
                    lambda t=t: broadcast(b, load(b, advance(b, scales, t, 4), F32, 4), floats),
                    lambda i=i: load(b, advance(b, row_scales, i, VECTOR), floats, 4),
                )
                store(b, value, advance(b, advance(b, y, y_stride, t), VECTOR * i))

    return tile


def _as_it_is(b: Any, total: Any, scale: Any, row_scale: Any) -> Any:
    return total


def _by_token(b: Any, total: Any, scale: Any, row_scale: Any) -> Any:
    return b.fmul(total, scale())


def _by_both(b: Any, total: Any, scale: Any, row_scale: Any) -> Any:
    return b.fmul(b.fmul(b.sitofp(total, vector_of(F32, LANES)), row_scale()), scale())


tile_f32 = _tile(F32, vector_of(F32, LANES), multiply_add, _as_it_is)
tile_f32_scaled = _tile(F32, vector_of(F32, LANES), multiply_add, _by_token)
tile_i16 = _tile(
    I32, vector_of(I16, 2 * LANES), lambda b, w, x, total: add_pairs(b, w, in_pairs(b, x), total), _by_both
)


@instruction(void, *[int64] * 10)
def tile_i8(
    b: Any,
    panel: Any,
    x: Any,
    x_stride: Any,
    n: Any,
    y: Any,
    y_stride: Any,
    scales: Any,
    excesses: Any,
    stride: Any,
    row_scales: Any,
) -> None:
    """Do TILE / 2 tokens, whose sums and those of a group fit the registers, with int8 activations.

    y[token, row] = row_scale * the sum over groups of (byte w * x - excess) * scale, both per token, `stride` bytes
    from one to the next.
    """
    ints, floats, words = vector_of(I32, LANES), vector_of(F32, LANES), word(GROUP // 4)
    tokens = [b.mul(stride, word(t)) for t in range(TILE // 2)]
    sums, totals = ([accumulators(b, kind, 2) for _ in tokens] for kind in (floats, ints))

    def add_group(group: Any, count: Any) -> None:
        begin, offset = b.mul(group, words), b.mul(group, word(4))
        for token, pair in zip(tokens, totals, strict=True):
            excess = b.sub(ir.Constant(I32, 0), load(b, b.add(b.add(excesses, token), offset), I32, 4))
            for total in pair:
                b.store(broadcast(b, excess, ints), total)
        factors = advance(b, panel, begin, 2 * VECTOR), word(2 * VECTOR), advance(b, x, begin, 4), x_stride, count
        _multiply_tile(b, factors, totals, vector_of(I8, 4 * LANES), multiply_bytes)
        for token, pair, token_sums in zip(tokens, totals, sums, strict=True):
            scale = broadcast(b, load(b, b.add(b.add(scales, token), offset), F32, 4), floats)
            for total, to in zip(pair, token_sums, strict=True):
                b.store(multiply_add(b, b.sitofp(b.load(total), floats), scale, b.load(to)), to)

    whole, rest = b.udiv(n, words), b.urem(n, words)
    with cgutils.for_range(b, whole) as loop:
        add_group(loop.index, words)
    with b.if_then(b.icmp_unsigned(">", rest, word(0))):
        add_group(whole, rest)
    for i in range(2):
        row_scale = load(b, advance(b, row_scales, i, VECTOR), floats, 4)
        for t, pair in enumerate(sums):
            value = b.fmul(b.load(pair[i]), row_scale)
            store(b, value, advance(b, advance(b, y, y_stride, t), VECTOR * i))


# All tokens, tile by tile


def _by_tiles(multiply: Any, n_at_once: int) -> Any:
    """Return `by_tiles(x, y, y_stride, n_tokens, row, n_rows, scales, n_in)`: the panel in x's scratch by all tokens.

    `multiply(x, first, n_in, scales, to, to_stride)` does n_at_once tokens and writes PANEL floats of each; scales are
    those of the rows.
    """

    @njit(**HELP)
    def by_tiles(x, y, y_stride, n_tokens, row, n_rows, scales, n_in):
        never_inline()
        tile = i64(x)[X_TILE]
        if n_rows < PANEL and scales:  # nothing may be read behind the last
            own = tile + TILE * PANEL * 4
            for r in range(n_rows):
                f32(own)[r] = f32(scales)[r]
            scales = own
        for begin in range(0, n_tokens, n_at_once):
            first = min(begin, n_tokens - n_at_once)  # the last tile overlaps the one before and gives the same again
            to = y + (first * y_stride + row) * 4
            if n_rows == PANEL:
                multiply(x, first, n_in, scales, to, y_stride * 4)
            else:
                multiply(x, first, n_in, scales, tile, PANEL * 4)
                for t in range(n_at_once):
                    for r in range(n_rows):
                        f32(to + t * y_stride * 4)[r] = f32(tile)[t * PANEL + r]

    return by_tiles


@njit(**INLINE)
def multiply_f32(x, first, n_in, scales, to, to_stride):
    """Float32 by float32."""
    x = i64(x)
    source, stride = x[X_FLOAT] + first * x[X_FLOAT_STRIDE] * 4, x[X_FLOAT_STRIDE] * 4
    tile_f32(x[X_PANEL], 2 * VECTOR, source, stride, n_in, to, to_stride, 0, 0)


@njit(**INLINE)
def multiply_i16(x, first, n_in, scales, to, to_stride):
    """Pairs of int16 along n_in; a sum of codes is scaled by row and token."""
    x = i64(x)
    codes, stride, own = x[X_CODES] + first * x[X_STRIDE] * 2, x[X_STRIDE] * 2, x[X_SCALES] + first * 4
    tile_i16(x[X_PANEL], 2 * VECTOR, codes, stride, (n_in + 1) // 2, to, to_stride, own, scales)


@njit(**INLINE)
def multiply_i8(x, first, n_in, scales, to, to_stride):
    """Fours of bytes (OFFSET too large) along n_in by int8, in groups with scales; rows have theirs besides."""
    x = i64(x)
    stride, groups = x[X_STRIDE], first * x[X_STRIDE] // 32 * 4
    own, excesses, codes = x[X_GROUP_SCALES] + groups, x[X_SUMS] + groups, x[X_CODES] + first * stride
    tile_i8(x[X_PANEL], codes, stride, (n_in + 3) // 4, to, to_stride, own, excesses, stride // 8, scales)


floats_by_tiles = _by_tiles(multiply_f32, TILE)
pairs_by_tiles = _by_tiles(multiply_i16, TILE)
bytes_by_tiles = _by_tiles(multiply_i8, TILE // 2)


@njit(**HELP)
def codes_by_tiles(codes, row_bytes, x, y, y_stride, n_tokens, row, n_rows, scales, n_in):
    """Multiply rows of int8 codes, which lie outside the panel, by all tokens."""
    if BYTE_PAIRS:
        pack_bytes(codes, row_bytes, n_in, n_rows, i64(x)[X_PANEL])
        bytes_by_tiles(x, y, y_stride, n_tokens, row, n_rows, scales, n_in)
    else:
        pack_pairs(codes, row_bytes, n_in, n_rows, i64(x)[X_PANEL])
        pairs_by_tiles(x, y, y_stride, n_tokens, row, n_rows, scales, n_in)


def panel_of_decoded(decode: Any) -> Any:
    """Return `panel` for rows that `decode(w, row, y, step)` turns into the floats y[0], y[step], y[2 step], ..."""

    @njit(**HELP)
    def panel(w, x, y, y_stride, n_tokens, row, n_rows):
        for r in range(n_rows):
            decode(w, row + r, i64(x)[X_PANEL] + r * 4, PANEL)
        floats_by_tiles(x, y, y_stride, n_tokens, row, n_rows, 0, i64(w)[W_N_IN])

    return panel


# Panels


def _pack(unit: Any, widen: Callable[[Any, Any], Any]) -> Any:
    """Return what unpacks PANEL rows for a tile: `pack(rows, row_bytes, n_units, panel)`.

    A unit is what one lane of the panel holds of one row. Squares of LANES x LANES units are transposed in registers
    by perfect shuffles, as many times as 2 goes into LANES, and each line widened to 4 bytes a lane: ten
    times as fast as unit by unit. What does not fill a square, n_units % LANES, is left to the caller.
    """
    size = unit.width // 8

    @instruction(void, *[int64] * 4)
    def pack(b: Any, rows: Any, row_bytes: Any, n_units: Any, panel: Any) -> None:
        low = [lane // 2 + lane % 2 * LANES for lane in range(LANES)]
        high = [lane + LANES // 2 for lane in low]
        with cgutils.for_range(b, b.udiv(n_units, word(LANES))) as loop:
            first = b.mul(loop.index, word(LANES))
            for half_panel in range(2):
                square = []
                for row in range(LANES):
                    at = advance(b, rows, row_bytes, half_panel * LANES + row)
                    square.append(load(b, advance(b, at, first, size), vector_of(unit, LANES)))
                for _ in range(LANES.bit_length() - 1):
                    pairs = list(zip(square[: LANES // 2], square[LANES // 2 :], strict=True))
                    square = [shuffle(b, v, w, lanes) for v, w in pairs for lanes in (low, high)]
                for i, line in enumerate(square):
                    at = advance(b, advance(b, panel, first, 2 * VECTOR), i * 2 * VECTOR + half_panel * VECTOR)
                    store(b, widen(b, line), at)

    return pack


def _widen_codes(b: Any, pairs: Any) -> Any:
    return b.sext(in_pairs(b, b.bitcast(pairs, vector_of(I8, 2 * LANES))), vector_of(I16, 2 * LANES))


pack_squares_i8 = _pack(I16, _widen_codes)  # a unit is two int8, which become two int16
pack_squares_bytes = _pack(I32, lambda b, codes: b.xor(codes, ir.Constant(codes.type, [OFFSET * 0x01010101] * LANES)))
pack_squares_f16 = _pack(I16, widen_half)
pack_squares_f32 = _pack(I32, lambda b, line: line)


@njit(**HELP)
def pack_bytes(codes, row_bytes, n_in, n_rows, panel):
    """Spread rows over lanes: panel[four, row] = codes[row, 4 four .. 4 four + 3] + OFFSET, bytes."""
    never_inline()
    done = 0
    if n_rows == PANEL:
        pack_squares_bytes(codes, row_bytes, n_in // 4, panel)
        done = n_in // 4 // LANES * LANES * 4
    panel = u8(panel)
    for r in range(n_rows):
        source = i8(codes + r * row_bytes)
        for i in range(done, n_in):
            panel[(i // 4 * PANEL + r) * 4 + i % 4] = source[i] + OFFSET


@njit(**HELP)
def pack_pairs(codes, row_bytes, n_in, n_rows, panel):
    """Spread rows over lanes: panel[pair, row] = (codes[row, 2 pair], codes[row, 2 pair + 1]) as int16.

    The two stand side by side, or where `in_pairs` puts them.
    """
    never_inline()
    n_pairs, done = n_in // 2, 0
    if n_rows == PANEL:
        pack_squares_i8(codes, row_bytes, n_pairs, panel)
        done = n_pairs // LANES * LANES
    panel = i16(panel)
    for r in range(n_rows):
        source = i8(codes + r * row_bytes)
        first, second = (2 * r, 2 * r + 1) if X86 else (r + r // LANES * LANES, r + r // LANES * LANES + LANES)
        for i in range(2 * done, n_in):
            panel[i // 2 * 2 * PANEL + (second if i % 2 else first)] = source[i]
        if n_in % 2:
            panel[n_pairs * 2 * PANEL + second] = 0
