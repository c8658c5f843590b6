"""Attention of one head over its cached keys and values: token by token, or many tokens at once by tiles."""

from __future__ import annotations

from numba import njit

from minigpt.kernels.elementwise import softmax
from minigpt.kernels.entry import HELP, float32
from minigpt.kernels.floats import pack_f32
from minigpt.kernels.intrinsics import f32, never_inline
from minigpt.kernels.target import PANEL, TILE
from minigpt.kernels.tiles import tile_f32


@njit(**HELP)
def attend(q, keys, values, n_positions, head_dim, scores, y):
    """One token and head over n_positions keys and values [n_positions, head_dim]; q is scaled already."""
    never_inline()
    query, weights, y = f32(q), f32(scores), f32(y)
    for position in range(n_positions):
        key = f32(keys + position * head_dim * 4)
        total = float32(0)
        for i in range(head_dim):
            total += query[i] * key[i]
        weights[position] = total
    factor = softmax(scores, n_positions)
    for i in range(head_dim):
        y[i] = 0
    for position in range(n_positions):
        value = f32(values + position * head_dim * 4)
        weight = weights[position] * factor
        for i in range(head_dim):
            y[i] += weight * value[i]


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
    for begin in range(0, n_tokens, TILE):
        first = min(begin, n_tokens - TILE)
        seen = first_position + first + TILE  # positions that the tile's last token sees
        for panel in range((seen + PANEL - 1) // PANEL):
            lines = scratch + panel * PANEL * head_dim * 4
            tile_f32(lines, PANEL * 4, q + first * q_stride, q_stride, head_dim, scores + panel * PANEL * 4, stride)
        for t in range(TILE):
            row = scores + t * stride
            visible = seen - TILE + t + 1
            factor = softmax(row, visible)
            weights = f32(row)
            for i in range(visible):
                weights[i] *= factor
            for i in range(visible, seen):
                weights[i] = 0
        for i in range(0, head_dim, PANEL):
            tile_f32(values + i * 4, head_dim * 4, scores, stride, seen, y + first * y_stride + i * 4, y_stride)
