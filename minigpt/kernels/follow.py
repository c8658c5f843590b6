"""Greedy decoding: token after token, without Python in between.

Between two tokens the interpreter takes far longer than usual, because nothing of it is in the caches any more.
"""

from __future__ import annotations

from numba import njit

from minigpt.kernels.elementwise import largest
from minigpt.kernels.entry import HELP, entry, float32, int64
from minigpt.kernels.forward import rows_of_chunk
from minigpt.kernels.intrinsics import call_clock, f32, i64
from minigpt.kernels.phases import run_job
from minigpt.layout import *


@njit(**HELP)
def likeliest(p):
    """Return the first of the highest logits of the one token, -1 if a logit that may be it is not finite.

    Of rough logits the highest have been made exact; chunks without any need no look.
    """
    n_out, step = i64(p[P_LM_HEAD])[W_N_OUT], rows_of_chunk(p, p[P_LM_HEAD], 1)
    best, top = -1, float32(-3e38)
    for chunk in range((n_out + step - 1) // step):
        if p[P_SCREEN] and f32(p[P_SCREEN])[chunk * S_SIZE + S_LIMITS] == float32(0):
            continue
        begin = chunk * step
        here = largest(p[P_LOGITS] + begin * 4, min(step, n_out - begin), False)
        if not here <= float32(3e38):
            return -1
        if here > top:
            top, i = here, begin
            while f32(p[P_LOGITS])[i] != here:
                i += 1
            best = i
    return best


@njit(**HELP)
def note(p, row, id):
    """Write down an id, when it was found, and how long it took since the one before."""
    if p[P_CLOCK]:
        call_clock(p[P_CLOCK], (row, 1))
    here, before = i64(row), i64(row - F_SIZE * 8)
    here[F_SPENT] = (here[F_SECONDS] - before[F_SECONDS]) * 1_000_000_000 + here[F_NANOSECONDS] - before[F_NANOSECONDS]
    here[F_ID] = id


@entry(7, int64)
def follow(program, kernel, found, n, stops, n_stops, worth):
    """Let the team run the token in place, then the likeliest next one, and so on; return how many were found.

    Up to n, until one of the ids in `stops`, until logits are not finite, which is noted as the id -1, or until more
    than `worth` logits had to be made exact. They go to `found` [1 + n, F_SIZE]; the first record has the time alone.
    """
    p = i64(program)
    if p[P_CLOCK]:
        call_clock(p[P_CLOCK], (found, 1))
    for i in range(n):
        p[P_N_EXACT] = 0
        run_job(p[P_TEAM], kernel, program)
        id = likeliest(p)
        note(p, found + (i + 1) * F_SIZE * 8, id)
        over = id < 0 or p[P_N_EXACT] > worth
        for j in range(n_stops):
            over = over or id == i64(stops)[j]
        if over:
            return i + 1
        i64(p[P_IDS])[0] = id
        i64(p[P_POSITIONS])[0] += 1
    return n
