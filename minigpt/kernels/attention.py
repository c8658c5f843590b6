"""Attention of one head over its cached keys and values: token by token, or many tokens at once by tiles.

There is an entry point `attend_<kind>` for every way to keep keys and values (`cache.KINDS`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from minigpt.kernels.elementwise import largest, nearest, softmax
from minigpt.kernels.entry import HELP, INLINE, entry, float32, instruction, int32, int64, void
from minigpt.kernels.floats import pack_f32
from minigpt.kernels.intrinsics import f32, float_of_bits, i8, i64, never_inline
from minigpt.kernels.target import LANES, PANEL, TILE
from minigpt.kernels.tiles import tile_f32, tile_f32_scaled
from minigpt.kernels.vectors import (
    F32,
    I8,
    ROWS,
    accumulators,
    advance,
    broadcast,
    load,
    multiply_add,
    store,
    sum_rows,
    vector_of,
    word,
)
from minigpt.layout import *


def _size(element: Any) -> int:
    """Return the bytes of an IR type."""
    return 4 if element == F32 else element.width // 8


# One token: its scores are sums across lanes, ROWS positions at a time; its output stays in registers meanwhile


def _score(element: Any, widen: Callable[[Any, Any], Any]) -> Any:
    """Return `score(q, rows, n, head_dim, y)`: y[position] = q . rows[position].

    For the whole times ROWS in n positions; head_dim is a multiple of LANES.
    """
    size, lanes = _size(element), vector_of(F32, LANES)

    @instruction(void, *[int64] * 5)
    def score(b: Any, q: Any, rows: Any, n: Any, head_dim: Any, y: Any) -> None:
        totals = accumulators(b, lanes, ROWS)
        with cgutils.for_range(b, b.udiv(n, word(ROWS))) as some:
            first = b.mul(some.index, word(ROWS))
            for total in totals:
                b.store(ir.Constant(lanes, None), total)
            with cgutils.for_range(b, b.udiv(head_dim, word(LANES))) as part:
                i = b.mul(part.index, word(LANES))
                query = load(b, advance(b, q, i, 4), lanes, 4)
                for r, total in enumerate(totals):
                    at = b.add(b.mul(advance(b, first, r), head_dim), i)
                    row = widen(b, load(b, advance(b, rows, at, size), vector_of(element, LANES)))
                    b.store(multiply_add(b, row, query, b.load(total)), total)
            store(b, sum_rows(b, [b.load(total) for total in totals]), advance(b, y, first, 4))

    return score


def _mix(element: Any, widen: Callable[[Any, Any], Any]) -> Any:
    """Return `mix(rows, weights, n, head_dim, y)`: y = the sum of weights[position] * rows[position].

    For the whole times LANES in head_dim.
    """
    size, lanes = _size(element), vector_of(F32, LANES)

    @instruction(void, *[int64] * 5)
    def mix(b: Any, rows: Any, weights: Any, n: Any, head_dim: Any, y: Any) -> None:
        done = word(0)
        for count in (4, 1):  # vectors at once
            totals = accumulators(b, lanes, count)
            steps = b.udiv(b.sub(head_dim, done), word(count * LANES))
            with cgutils.for_range(b, steps) as some:
                first = b.add(done, b.mul(some.index, word(count * LANES)))
                for total in totals:
                    b.store(ir.Constant(lanes, None), total)
                with cgutils.for_range(b, n) as position:
                    weight = broadcast(b, load(b, advance(b, weights, position.index, 4), F32, 4), lanes)
                    at = advance(b, rows, b.add(b.mul(position.index, head_dim), first), size)
                    for i, total in enumerate(totals):
                        row = widen(b, load(b, advance(b, at, i * LANES, size), vector_of(element, LANES)))
                        b.store(multiply_add(b, row, weight, b.load(total)), total)
                for i, total in enumerate(totals):
                    store(b, b.load(total), advance(b, advance(b, y, first, 4), i * LANES, 4))
            done = b.add(done, b.mul(steps, word(count * LANES)))

    return mix


def _over_rows(element: Any, pointer: Any, widen: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """Return `score` and `mix` for any n and head_dim; widen turns a vector of elements into float32."""
    size, score_vectors, mix_vectors = _size(element), _score(element, widen), _mix(element, widen)

    @njit(**HELP)
    def score(q, rows, n, head_dim, y):
        done = n // ROWS * ROWS if head_dim % LANES == 0 else 0
        score_vectors(q, rows, done, head_dim, y)
        query, scores = f32(q), f32(y)
        for position in range(done, n):
            row, total = pointer(rows + position * head_dim * size), float32(0)
            for i in range(head_dim):
                total += query[i] * float32(row[i])
            scores[position] = total

    @njit(**HELP)
    def mix(rows, weights, n, head_dim, y):
        mix_vectors(rows, weights, n, head_dim, y)
        shares, sums = f32(weights), f32(y)
        for i in range(head_dim // LANES * LANES, head_dim):
            total = float32(0)
            for position in range(n):
                total += shares[position] * float32(pointer(rows + position * head_dim * size)[i])
            sums[i] = total

    return score, mix


# Many tokens


@njit(**HELP)
def attend_tiles(q, q_stride, keys, values, first_position, n_tokens, head_dim, scratch, y, y_stride):
    """Do n_tokens >= TILE neighbours of one head: both products are matrices, multiplied by tiles of tokens.

    Only TILE rows of the scores exist at a time. The keys are spread over lanes once; the values, [position, dim],
    lie as a panel must already. Strides in bytes; head_dim is a multiple of PANEL.
    """
    never_inline()
    n_positions = first_position + n_tokens
    n_panels = (n_positions + PANEL - 1) // PANEL
    for panel in range(n_panels):
        begin = panel * PANEL
        n_rows = min(PANEL, n_positions - begin)
        pack_f32(keys + begin * head_dim * 4, head_dim, n_rows, scratch + begin * head_dim * 4)
    scores = scratch + n_panels * PANEL * head_dim * 4
    stride = n_panels * PANEL * 4
    factors = scores + TILE * stride
    for begin in range(0, n_tokens, TILE):
        first = min(begin, n_tokens - TILE)
        seen = first_position + first + TILE  # positions that the tile's last token sees
        n_seen = (seen + PANEL - 1) // PANEL  # panels
        for panel in range(n_seen):
            lines, to = scratch + panel * PANEL * head_dim * 4, scores + panel * PANEL * 4
            tile_f32(lines, PANEL * 4, q + first * q_stride, q_stride, head_dim, to, stride, 0, 0)
        for t in range(TILE):
            f32(factors)[t] = softmax(scores + t * stride, seen - TILE + t + 1, n_seen)
        for i in range(0, head_dim, PANEL):
            to = y + first * y_stride + i * 4
            tile_f32_scaled(values + i * 4, head_dim * 4, scores, stride, seen, to, y_stride, factors, 0)


# A kind: `find(layer, head, n_positions, head_dim)` returns the place of a head of a sequence, a tuple of addresses.
# `append(place, position, key, value, head_dim)` keeps two rows of floats, which it may overwrite, and
# `score(place, q, n, head_dim, scores)`, `mix(place, weights, n, head_dim, y)` and
# `floats(place, n, head_dim, scratch)`, the addresses of keys and of values as floats, are about the first n positions.


def _add_kind(name: str, find: Any, append: Any, score: Any, mix: Any, floats: Any) -> None:
    """Register `attend_<name>(program, layer, thread, head, short)`: Z = attention of one head, for all tokens.

    Its q, k and v are in y, without their biases; new keys and values go to the cache first. If it is cut short, rows
    of Z are those of the tokens to keep.
    """

    @njit(**HELP)
    def attend(q, place, n_positions, head_dim, scores, y):
        """Do one token; q is scaled already."""
        never_inline()
        score(place, q, n_positions, head_dim, scores)
        factor = softmax(scores, n_positions, (n_positions + PANEL - 1) // PANEL)
        mix(place, scores, n_positions, head_dim, y)
        for i in range(head_dim):
            f32(y)[i] *= factor

    def attend_head(program, layer, thread, head, short):
        p, block = i64(program), i64(layer)
        head_dim, n_tokens, n_head, n_positions = p[P_HEAD_DIM], p[P_N_TOKENS], block[L_N_HEAD], p[P_N_POSITIONS]
        begin, width, y_stride, z_stride = head * head_dim, n_head * head_dim, p[P_Y_STRIDE], p[P_Z_STRIDE]
        positions, sequences = i64(p[P_POSITIONS]), i64(p[P_SEQUENCES])
        bias, factor = f32(block[L_C_ATTN_BIAS]), float_of_bits(int32(block[L_ATTN_SCALE]))
        for token in range(n_tokens):
            at = p[P_Y] + token * y_stride * 4
            y, key = f32(at), at + (width + begin) * 4
            for i in range(begin, begin + head_dim):
                y[i] = (y[i] + bias[i]) * factor
                y[i + width] += bias[i + width]
                y[i + 2 * width] += bias[i + 2 * width]
            place = find(layer, sequences[token] * n_head + head, n_positions, head_dim)
            append(place, positions[token], key, key + width * 4, head_dim)
        runs, scratch = i64(p[P_RUNS]), p[P_SCORES] + thread * p[P_SCORES_STRIDE] * 4
        if short:
            for i in range(p[P_N_KEEP]):
                token = i64(p[P_KEEP])[i]
                place = find(layer, sequences[token] * n_head + head, n_positions, head_dim)
                q, z = p[P_Y] + (token * y_stride + begin) * 4, p[P_Z] + (i * z_stride + begin) * 4
                attend(q, place, positions[token] + 1, head_dim, scratch, z)
            return
        for run in range(p[P_N_RUNS]):
            first, n = runs[run], runs[run + 1] - runs[run]
            place = find(layer, sequences[first] * n_head + head, n_positions, head_dim)
            q, z = p[P_Y] + (first * y_stride + begin) * 4, p[P_Z] + (first * z_stride + begin) * 4
            seen = positions[first] + 1
            if n >= TILE and head_dim % PANEL == 0:
                keys, values = floats(place, seen + n - 1, head_dim, scratch)
                tiles = scratch + 2 * n_positions * head_dim * 4  # behind what may have been decoded
                attend_tiles(q, y_stride * 4, keys, values, seen - 1, n, head_dim, tiles, z, z_stride * 4)
            else:
                for i in range(n):
                    attend(q + i * y_stride * 4, place, seen + i, head_dim, scratch, z + i * z_stride * 4)

    entry(5, name=f"attend_{name}")(attend_head)


# f32: as they are

score_f32, mix_f32 = _over_rows(F32, f32, lambda b, row: row)


@njit(**HELP)
def find_f32(layer, head, n_positions, head_dim):
    """Return keys and values."""
    offset = head * n_positions * head_dim * 4
    return i64(layer)[L_KEYS] + offset, i64(layer)[L_VALUES] + offset


@njit(**HELP)
def append_f32(place, position, key, value, head_dim):
    """Copy."""
    keys, values = place
    to_keys, to_values = f32(keys + position * head_dim * 4), f32(values + position * head_dim * 4)
    for i in range(head_dim):
        to_keys[i], to_values[i] = f32(key)[i], f32(value)[i]


@njit(**INLINE)
def score_place_f32(place, q, n, head_dim, scores):
    """Multiply the keys."""
    score_f32(q, place[0], n, head_dim, scores)


@njit(**INLINE)
def mix_place_f32(place, weights, n, head_dim, y):
    """Add up the values."""
    mix_f32(place[1], weights, n, head_dim, y)


@njit(**HELP)
def floats_f32(place, n, head_dim, scratch):
    """Point to the cache itself."""
    return place


_add_kind("f32", find_f32, append_f32, score_place_f32, mix_place_f32, floats_f32)


# int8: codes with a scale for each position; of keys, what differs from a centre, the first key of CENTRED positions

score_i8, mix_i8 = _over_rows(I8, i8, lambda b, row: b.sitofp(row, vector_of(F32, LANES)))


@njit(**HELP)
def find_int8(layer, head, n_positions, head_dim):
    """Return the codes, scales and centres of keys, and the codes and scales of values."""
    block, rows = i64(layer), head * n_positions
    centres = block[L_KEY_CENTRES] + head * ((n_positions + CENTRED - 1) // CENTRED) * head_dim * 4
    keys, values = block[L_KEYS] + rows * head_dim, block[L_VALUES] + rows * head_dim
    return keys, block[L_KEY_SCALES] + rows * 4, centres, values, block[L_VALUE_SCALES] + rows * 4


@njit(**HELP)
def append_int8(place, position, key, value, head_dim):
    """Round, keys after subtracting their centre."""
    keys, key_scales, centres, values, value_scales = place
    centre, key_floats = f32(centres + position // CENTRED * head_dim * 4), f32(key)
    if position % CENTRED == 0:
        for i in range(head_dim):
            centre[i] = key_floats[i]
    for i in range(head_dim):
        key_floats[i] -= centre[i]
    f32(key_scales)[position] = round_row(key, keys + position * head_dim, head_dim)
    f32(value_scales)[position] = round_row(value, values + position * head_dim, head_dim)


@njit(**HELP)
def round_row(source, to, n):
    """Write codes and return their scale."""
    never_inline()
    scale = max(largest(source, n, True), float32(1e-9)) / float32(127)
    source, to, inverse = f32(source), i8(to), float32(1) / scale
    for i in range(n):
        to[i] = nearest(source[i] * inverse)
    return scale


@njit(**HELP)
def score_int8(place, q, n, head_dim, scores):
    """Multiply codes, then scale, and add the product with the centre."""
    keys, key_scales, centres, _, _ = place
    score_i8(q, keys, n, head_dim, scores)
    products, scales, query = f32(scores), f32(key_scales), f32(q)
    for begin in range(0, n, CENTRED):
        centre, total = f32(centres + begin // CENTRED * head_dim * 4), float32(0)
        for i in range(head_dim):
            total += query[i] * centre[i]
        for position in range(begin, min(begin + CENTRED, n)):
            products[position] = products[position] * scales[position] + total


@njit(**HELP)
def mix_int8(place, weights, n, head_dim, y):
    """Multiply the weights by the scales, then the codes by both."""
    _, _, _, values, value_scales = place
    shares, scales = f32(weights), f32(value_scales)
    for position in range(n):
        shares[position] *= scales[position]
    mix_i8(values, weights, n, head_dim, y)


@njit(**HELP)
def floats_int8(place, n, head_dim, scratch):
    """Decode both to the scratch."""
    never_inline()
    keys, key_scales, centres, values, value_scales = place
    to_keys, to_values = f32(scratch), f32(scratch + n * head_dim * 4)
    for position in range(n):
        key, value = i8(keys + position * head_dim), i8(values + position * head_dim)
        key_scale, value_scale = f32(key_scales)[position], f32(value_scales)[position]
        centre, first = f32(centres + position // CENTRED * head_dim * 4), position * head_dim
        for i in range(head_dim):
            to_keys[first + i] = float32(key[i]) * key_scale + centre[i]
            to_values[first + i] = float32(value[i]) * value_scale
    return scratch, scratch + n * head_dim * 4


_add_kind("int8", find_int8, append_int8, score_int8, mix_int8, floats_int8)
