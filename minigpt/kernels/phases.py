"""How threads share a kernel out: work is cut into phases, a phase into chunks, and whoever is free takes the next.

A phase ends when its chunks are done, not when every thread has come by: a thread that the operating system
has put aside, or that is slower than the others, holds nobody up unless it is inside a chunk. What a thread computes
for itself before it takes a chunk may be garbage if the phase is over by then, but then it gets no chunk.
`minigpt/team.py` starts the threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from minigpt.kernels.entry import HELP, entry, instruction, int64, void
from minigpt.kernels.intrinsics import call_entry, call_yield, i64, never_inline
from minigpt.kernels.target import X86
from minigpt.kernels.vectors import I64
from minigpt.layout import *


def _atomic(operation: str) -> Any:
    """Return a function (address, operand) -> old value."""

    @instruction(int64, int64, int64)
    def update(b: Any, address: Any, operand: Any) -> Any:
        return b.atomic_rmw(operation, b.inttoptr(address, I64.as_pointer()), operand, "seq_cst")

    return update


atomic_add, atomic_exchange = _atomic("add"), _atomic("xchg")


@instruction(int64, int64)
def atomic_load(b: Any, address: Any) -> Any:
    """Read an int64 that other threads write; what they wrote before it is visible after."""
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@instruction(types.boolean, int64, int64, int64)
def atomic_replace(b: Any, address: Any, old: Any, new: Any) -> Any:
    """Write new if the int64 still is old; return whether it was."""
    return b.extract_value(b.cmpxchg(b.inttoptr(address, I64.as_pointer()), old, new, "seq_cst", "seq_cst"), 1)


@instruction(void)
def pause(b: Any) -> None:
    """Tell the processor that this is a waiting loop."""
    if X86:
        function = ir.FunctionType(ir.VoidType(), [])
        b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.sse2.pause"), [])


SPINS = 256  # about 5 us: longer than a phase's threads differ, shorter than anybody else misses the processor


@njit(**HELP)
def wait_turn(team, turns):
    """Wait a little: spin at first, then let other processes run."""
    if turns < SPINS:
        pause()
    else:
        call_yield(i64(team)[T_YIELD])


@njit(**HELP)
def is_over(team, phase):
    """Tell whether all chunks of a phase are done."""
    return (atomic_load(team + T_TICKET * 8) >> 32) > phase


@njit(**HELP)
def take_chunk(team, phase, n_chunks):
    """Return the next chunk of a phase, or -1 when none is left."""
    while True:
        ticket = atomic_load(team + T_TICKET * 8)
        chunk = ticket & 0xFFFFFFFF
        if ticket >> 32 != phase or chunk >= n_chunks:
            return -1
        if atomic_replace(team + T_TICKET * 8, ticket, ticket + 1):
            return chunk


@njit(**HELP)
def next_chunk(team, phase, n_chunks):
    """Count a chunk as done, opening the next phase after the last, and return another one or -1."""
    if atomic_add(team + T_DONE * 8, 1) == n_chunks - 1:
        atomic_exchange(team + T_DONE * 8, 0)
        atomic_exchange(team + T_TICKET * 8, (phase + 1) << 32)
        return -1
    return take_chunk(team, phase, n_chunks)


@njit(**HELP)
def finish_phase(team, phase):
    """Wait until all chunks of a phase are done and return the next phase."""
    never_inline()
    turns = 0
    while not is_over(team, phase):
        wait_turn(team, turns)
        turns += 1
    return phase + 1


@njit(**HELP)
def run_job(team, kernel, argument):
    """Open a job for the workers if they may have part in it, do it as thread 0, and wait until all have left."""
    record = i64(team)
    record[T_ENTRY], record[T_ARGUMENT] = kernel, argument
    record[T_TICKET], record[T_DONE] = 0, 0
    if record[T_ALONE]:
        call_entry(kernel, (argument, 0))
        return
    job = (record[T_JOB] >> 32) + 1  # odd
    atomic_exchange(team + T_JOB * 8, job << 32)
    call_entry(kernel, (argument, 0))
    atomic_add(team + T_JOB * 8, 1 << 32)  # even: nobody can enter any more
    turns = 0
    while atomic_load(team + T_JOB * 8) & 0xFFFFFFFF:
        wait_turn(team, turns)
        turns += 1


@entry(3)
def run_team(team, kernel, argument):
    """`run_job`, for callers outside."""
    run_job(team, kernel, argument)


@entry(2, int64)
def work_for_team(team, thread):
    """Take part in jobs; return 1 to be parked after a time without any, 0 when the team is closing."""
    record, job_word, state = i64(team), team + T_JOB * 8, team + (T_STATES + thread * T_STRIDE) * 8
    last, turns = 0, 0
    while True:
        word = atomic_load(job_word)
        job = word >> 32
        if record[T_CLOSING]:
            return 0
        if job & 1 and job != last:
            if atomic_replace(job_word, word, word + 1):
                last = job
                call_entry(record[T_ENTRY], (record[T_ARGUMENT], thread))
                atomic_add(job_word, -1)
                turns = 0
            continue
        wait_turn(team, turns)
        turns += 1
        if turns > SPINS + (0 if record[T_ALONE] else record[T_PATIENCE]):
            atomic_exchange(state, 1)
            return 1
