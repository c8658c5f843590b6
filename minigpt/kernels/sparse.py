"""Sparse matrices of int8 codes, one scale a row: bitmaps, 4 kept of 8, and blocks of 32 columns.

Zeros are put back a row at a time; then the kernels are those of int8. Blocks that are not stored are skipped, and
with AVX2 the zeros of 4 in 8 are too.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.entry import EXACT, HELP, add_encoding, float32, instruction, int32, int64, void
from minigpt.kernels.int8 import WIDTH, codes_by_panel, codes_by_row, dot_cached
from minigpt.kernels.intrinsics import f32, i8, i64, u8, u16, u32
from minigpt.kernels.target import EXPANDS, SHUFFLES
from minigpt.kernels.tiles import matmul_of
from minigpt.kernels.vectors import (
    I8,
    I16,
    I32,
    I64,
    accumulators,
    add_pairs,
    advance,
    call_own,
    fold,
    load,
    prefetch,
    shuffle,
    store,
    sum_lanes,
    vector_of,
    word,
)
from minigpt.layout import *

# Masks


def _moves(mask: int) -> list[int]:
    """Return the bytes of a word that move up by 4, by 2 and by 1 to spread over the bits of a mask, and those kept."""
    selected = [0, 0, 0, 0]
    for source, target in enumerate(i for i in range(8) if mask >> i & 1):
        place = source
        for step, distance in enumerate((4, 2, 1)):
            if (target - source) & distance:
                place += distance
                selected[step] |= 255 << 8 * place
        selected[3] |= 255 << 8 * target
    return selected


def _spread_word(b: Any, mask: Any, packed: Any) -> Any:
    """Do what `_spread` does for 8 bits, both as words, in three moves whose masks are looked up.

    Warren, Hacker's Delight 7-5.
    """
    table = [value for mask in range(256) for value in _moves(mask)]
    moves = cgutils.global_constant(b, "moves", ir.Constant(ir.ArrayType(I64, len(table)), table))
    at = b.add(b.ptrtoint(moves, I64), b.shl(mask, word(5)))
    for step, distance in enumerate((4, 2, 1)):
        selected = load(b, advance(b, at, 8 * step), I64, 8)
        moved = b.shl(packed, word(8 * distance))
        packed = b.or_(b.and_(packed, b.not_(selected)), b.and_(moved, selected))
    return b.and_(packed, load(b, advance(b, at, 24), I64, 8))


EVERY = 0x0101010101010101  # byte of a word
AHEAD = 2048  # bytes that are asked for before their turn


def _places(mask: int) -> int:
    """Return, for each bit of a mask, which of the packed bytes belongs there, or 0x80 where none does: 8 bytes."""
    return sum((bin(mask & (1 << i) - 1).count("1") if mask >> i & 1 else 0x80) << 8 * i for i in range(8))


def _spread_by_shuffles(b: Any, mask: Any, at: Any, most: float) -> Any:
    """Do what `_spread` does for 32 bits: two times 16 bytes, each taken from 16 packed ones."""
    table, kind = [_places(mask) for mask in range(256)], vector_of(I8, 16)
    places = b.ptrtoint(cgutils.global_constant(b, "places", ir.Constant(ir.ArrayType(I64, 256), table)), I64)
    masks = [b.and_(b.lshr(b.zext(mask, I64), word(8 * i)), word(255)) for i in range(4)]
    indices = [load(b, advance(b, places, bits, 8), I64, 8) for bits in masks]
    first = load(b, at, kind)
    if most < 1:  # as many for each mask: all are among the first 16
        both, offsets = [first, first], [int(8 * most) * i * EVERY for i in range(4)]
    else:
        counts = [b.ctpop(bits) for bits in masks]
        both, offsets = [first, load(b, b.add(at, b.add(counts[0], counts[1])), kind)], [0] * 4
        indices[1], indices[3] = (b.add(indices[i], b.mul(counts[i - 1], word(EVERY))) for i in (1, 3))
    index = ir.Constant(vector_of(I64, 4), ir.Undefined)
    for i, of_mask in enumerate(indices):
        index = b.insert_element(index, of_mask, ir.Constant(I32, i))
    packed = shuffle(b, *both, list(range(32)))
    index = b.bitcast(b.add(index, ir.Constant(index.type, offsets)), packed.type)
    return call_own(b, "x86.avx2.pshuf.b", packed.type, packed, index)


def _spread(b: Any, mask: Any, at: Any, most: float) -> Any:
    """Put the next of the bytes at an address wherever mask has a bit, and 0 elsewhere: a byte for each bit.

    At most this share of the bits are set, exactly so in every 8 if it is not 1: more bytes are not read.
    """
    if SHUFFLES:
        return _spread_by_shuffles(b, mask, at, most)
    n = mask.type.width
    packed, kind, bits = load(b, at, vector_of(I8, int(n * most))), vector_of(I8, n), vector_of(ir.IntType(1), n)
    if not EXPANDS:
        packed = b.zext(b.bitcast(packed, ir.IntType(8 * packed.type.count)), I64)
        return b.bitcast(_spread_word(b, b.zext(mask, I64), packed), kind)
    # from a register: the form that reads memory is microcode on Zen
    packed = shuffle(b, packed, ir.Constant(packed.type, ir.Undefined), [min(i, packed.type.count) for i in range(n)])
    return call_own(b, f"x86.avx512.mask.expand.v{n}i8", kind, packed, ir.Constant(kind, None), b.bitcast(mask, bits))


def _expand(most: float) -> Any:
    """Return `expand(bits, values, n, codes)`: undo a bitmap of n columns, a multiple of 32, into int8 codes.

    `most` is that of `_spread`.
    """

    @instruction(void, *[int64] * 4)
    def expand(b: Any, bits: Any, values: Any, n: Any, codes: Any) -> None:
        values = cgutils.alloca_once_value(b, values)
        done = word(0)
        for columns in (64, 32) if EXPANDS else (32,) if SHUFFLES else (8,):
            steps = b.udiv(b.sub(n, done), word(columns))
            with cgutils.for_range(b, steps) as loop:
                column = b.add(done, b.mul(loop.index, word(columns)))
                mask = load(b, b.add(bits, b.lshr(column, word(3))), ir.IntType(columns))
                at = b.load(values)
                if SHUFFLES:
                    prefetch(b, advance(b, at, AHEAD))
                store(b, _spread(b, mask, at, most), b.add(codes, column))
                count = b.ctpop(b.zext(mask, I64) if columns < 64 else mask)
                b.store(b.add(at, count if most == 1 else word(int(columns * most))), values)
            done = b.add(done, b.mul(steps, word(columns)))

    return expand


def _add_masked(name: str, find: Any, expand: Any, part: int, few: Any = None) -> None:
    """Register the kernels of rows that are a mask [n_in / 8] and the codes of its bits.

    `find(w, row, n_columns)` returns their addresses; n_columns is n_in rounded up to 32. `few` is that of `matmul_of`,
    by default one that puts the zeros of a row back.
    """

    @njit(**HELP)
    def unpack(w, row, n_rows, scratch):
        n_columns = (i64(w)[W_N_IN] + 31) // 32 * 32
        row_bytes = (n_columns + 63) // 64 * 64
        for r in range(n_rows):
            bits, values = find(w, row + r, n_columns)
            expand(bits, values, n_columns, scratch + r * row_bytes)
        return scratch, row_bytes

    def rows(w, row, y):
        n_in, scale = i64(w)[W_N_IN], f32(i64(w)[part])[row]
        bits, values = find(w, row, (n_in + 31) // 32 * 32)
        bits, values, y, place = u8(bits), i8(values), f32(y), 0
        for i in range(n_in):
            kept = int64(bits[i // 8]) >> (i % 8) & 1
            y[i] = float32(values[place]) * scale if kept else float32(0)
            place += kept

    few = few or codes_by_row(unpack, part, dot_cached)
    add_encoding(name, matmul_of(few, codes_by_panel(unpack, part)), rows)


@njit(**HELP)
def find_bitmap(w, row, n_columns):
    """Bitmap [n_out, n_in / 8], offsets [n_out + 1], values, scales [n_out]."""
    w = i64(w)
    return w[W_PART_0] + row * n_columns // 8, w[W_PART_2] + u32(w[W_PART_1])[row]


@njit(**HELP)
def find_nm(w, row, n_columns):
    """Masks [n_out, n_in / 8] with 4 bits each, codes [n_out, n_in / 2], scales [n_out]."""
    w = i64(w)
    return w[W_PART_0] + row * n_columns // 8, w[W_PART_1] + row * n_columns // 2


# Where bytes are shuffled by a table, activations are taken to the codes: half as many are left to multiply


def _picks(mask: int) -> int:
    """Return which bytes of 8 int16 are those that a mask of 4 bits names: 8 bytes."""
    places = [2 * i + byte for i in range(8) if mask >> i & 1 for byte in (0, 1)]
    return sum(place << 8 * i for i, place in enumerate(places[:8]))


@instruction(void, *[int64] * 3)
def interleave(b: Any, x: Any, n: Any, to: Any) -> None:
    """Copy n times 32 int16, four groups of 8 each, the second and the third in each other's place."""
    with cgutils.for_range(b, n) as loop:
        groups = load(b, advance(b, x, loop.index, 64), vector_of(I64, 8))
        store(b, shuffle(b, groups, groups, [0, 1, 4, 5, 2, 3, 6, 7]), advance(b, to, loop.index, 64))


@instruction(int32, *[int64] * 4)
def dot_picked(b: Any, masks: Any, codes: Any, x: Any, n: Any) -> Any:
    """Return the int32 sum of n times 16 codes times the activations, interleaved, that 4 masks pick of 32.

    Bytes stay within half a vector when they are shuffled: of groups 0 and 2 the picks are the lower ones of theirs.
    """
    table = ir.Constant(ir.ArrayType(I64, 256), [_picks(mask) for mask in range(256)])
    picks = b.ptrtoint(cgutils.global_constant(b, "picks", table), I64)
    totals, words, lanes = accumulators(b, vector_of(I32, 8), 2), vector_of(I64, 4), vector_of(I8, 32)
    doubles = vector_of(ir.DoubleType(), 4)  # what they are does not matter, but these are loaded into upper halves too

    def step(block: Any, total: Any) -> None:
        index, at = ir.Constant(doubles, ir.Undefined), advance(b, masks, block, 4)
        for i in range(4):  # 8 columns each
            mask = b.zext(load(b, advance(b, at, i), I8), I64)
            pick = load(b, advance(b, picks, mask, 8), doubles.element, 8)
            index = b.insert_element(index, pick, ir.Constant(I32, i))
        picked = []
        for i in (0, 1):  # each picks four times 4, of which two are for its own groups
            of_x = load(b, advance(b, advance(b, x, block, 64), 32 * i), lanes)
            of_x = call_own(b, "x86.avx2.pshuf.b", lanes, of_x, b.bitcast(index, lanes))
            picked.append(b.bitcast(of_x, words))
        activations = b.bitcast(shuffle(b, *picked, [0, 5, 2, 7]), vector_of(I16, 16))
        weights = b.sext(load(b, advance(b, codes, block, 16), vector_of(I8, 16)), activations.type)
        b.store(add_pairs(b, weights, activations, b.load(total)), total)

    blocks = b.udiv(n, word(4))
    with cgutils.for_range(b, blocks) as loop:
        first = b.mul(loop.index, word(4))
        prefetch(b, advance(b, advance(b, codes, first, 16), AHEAD))
        for i in range(4):
            step(b.add(first, word(i)), totals[i % 2])
    rest = b.mul(blocks, word(4))
    with cgutils.for_range(b, b.sub(n, rest)) as loop:
        step(b.add(loop.index, rest), totals[0])
    return sum_lanes(b, b.add(*(b.load(total) for total in totals)))


@njit(**EXACT)
def few_picked(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Multiply a few tokens; scales are applied in the order of `row_by_row`."""
    n, x = (i64(w)[W_N_IN] + 31) // 32, i64(x)
    row_bytes, scales, factors = x[X_STRIDE] * 2, f32(i64(w)[W_PART_2]), f32(x[X_SCALES])
    for token in range(n_tokens):
        interleave(x[X_CODES] + token * row_bytes, n, x[X_PANEL] + token * row_bytes)
    for row in range(row_begin, row_end):
        masks, codes = find_nm(w, row, n * 32)
        for token in range(n_tokens):
            total = float32(dot_picked(masks, codes, x[X_PANEL] + token * row_bytes, n))
            f32(y)[token * y_stride + row] = total * scales[row] * factors[token]


_add_masked("bitmap_int8", find_bitmap, _expand(1), W_PART_3)
_add_masked("nm_int8", find_nm, _expand(0.5), W_PART_2, few_picked if SHUFFLES else None)


# Blocks: pointers [n_out + 1], columns [n_blocks], codes [n_blocks, 32], scales [n_out]


ROOM = 8192  # bytes of sums, a part of the L1 cache
LANES = WIDTH // 4  # of a sum, half of what is added to: the less is written, the more reading goes on meanwhile


@instruction(void, *[int64] * 5)
def add_up_blocks(b: Any, codes: Any, columns: Any, x: Any, n: Any, sums: Any) -> None:
    """Write the sum of the first k products for each k up to n: block i of 32 codes times x[32 columns[i]...].

    What a row gives is the difference between two of them, exact though int32 may overflow. So there is one loop for
    all blocks of many rows: a loop for each short row would be mispredicted at its end.
    """
    (total,) = accumulators(b, vector_of(I32, 2 * LANES), 1)
    store(b, fold(b, b.load(total), LANES), sums)
    with cgutils.for_range(b, n) as loop:
        block = advance(b, codes, loop.index, 32)
        prefetch(b, advance(b, block, AHEAD))
        column = b.zext(load(b, advance(b, columns, loop.index, 2), I16, 2), I64)
        for i in range(0, 32, WIDTH):
            activations = load(b, advance(b, advance(b, x, column, 64), i, 2), vector_of(I16, WIDTH))
            wide = b.sext(load(b, advance(b, block, i), vector_of(I8, WIDTH)), activations.type)
            b.store(add_pairs(b, wide, activations, b.load(total)), total)
        place = advance(b, sums, b.add(loop.index, word(1)), 4 * LANES)
        store(b, fold(b, b.load(total), LANES), place)


@instruction(int32, int64, int64)
def difference(b: Any, begin: Any, end: Any) -> Any:
    """Return the int32 sum over the lanes of what came to a sum from one address to another."""
    kind = vector_of(I32, LANES)
    return sum_lanes(b, b.sub(load(b, end, kind, 4), load(b, begin, kind, 4)))


@njit(**HELP)
def few_blocks(w, x, y, y_stride, n_tokens, row_begin, row_end):
    """Multiply what is stored, as many rows at a time as have room for their sums."""
    w, x, y = i64(w), i64(x), f32(y)
    pointers, row_scales, scales = u32(w[W_PART_0]), f32(w[W_PART_3]), f32(x[X_SCALES])
    sums = x[X_PANEL]
    n_rows = max(1, ROOM // (4 * LANES) // ((w[W_N_IN] + 31) // 32))
    for row in range(row_begin, row_end, n_rows):
        end = min(row + n_rows, row_end)
        first = int64(pointers[row])
        n, codes, columns = int64(pointers[end]) - first, w[W_PART_2] + first * 32, w[W_PART_1] + first * 2
        for token in range(n_tokens):
            add_up_blocks(codes, columns, x[X_CODES] + token * x[X_STRIDE] * 2, n, sums)
            begin = sums
            for r in range(row, end):
                after = sums + (int64(pointers[r + 1]) - first) * 4 * LANES
                y[token * y_stride + r] = float32(difference(begin, after)) * row_scales[r] * scales[token]
                begin = after


@njit(**HELP)
def unpack_blocks(w, row, n_rows, scratch):
    """Put the empty blocks of rows back."""
    w = i64(w)
    pointers, columns = u32(w[W_PART_0]), u16(w[W_PART_1])
    row_bytes = (w[W_N_IN] + 31) // 32 * 32
    to = i64(scratch)
    for i in range(n_rows * row_bytes // 8):
        to[i] = 0
    for r in range(n_rows):
        for block in range(int64(pointers[row + r]), int64(pointers[row + r + 1])):
            source, to = i64(w[W_PART_2] + block * 32), i64(scratch + r * row_bytes + columns[block] * 32)
            for i in range(4):
                to[i] = source[i]
    return scratch, row_bytes


def rows_blocks(w, row, y):
    """Decode one row into float32; the last block of a row may reach beyond it."""
    w, y = i64(w), f32(y)
    n_in, pointers, scale = w[W_N_IN], u32(w[W_PART_0]), f32(w[W_PART_3])[row]
    for i in range(n_in):
        y[i] = 0
    for block in range(int64(pointers[row]), int64(pointers[row + 1])):
        codes, begin = i8(w[W_PART_2] + block * 32), int64(u16(w[W_PART_1])[block]) * 32
        for i in range(min(32, n_in - begin)):
            y[begin + i] = float32(codes[i]) * scale


add_encoding("block_int8", matmul_of(few_blocks, codes_by_panel(unpack_blocks, W_PART_3)), rows_blocks)
