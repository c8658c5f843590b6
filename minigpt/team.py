"""`Team`: a few threads that run one kernel together, ready within a microsecond while work comes and asleep otherwise.

The threads are Python's, so that no other library is needed, but they stay inside compiled code (`work_for_team`),
without the GIL, as long as jobs follow one another; after some idle time they come back and sleep on a lock. What a
job is, and how its work is shared out, is the kernel's business. Needs a compiled backend.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt import layout, ops
from minigpt.errors import OptionError

WINDOW = 16  # jobs that are timed together to see whether sharing them out pays
UNEVEN = 1.25  # times the quickest job of a window: a mean beyond it says that threads wait for their processors
SHORTEST, LONGEST = 4, 32  # windows until that is asked again
PATIENCE = 1000  # yields before a worker without a job sleeps: about half a millisecond on an idle processor
MAX_THREADS = 256


class Team:
    """Threads that run a kernel together; the calling thread is one of them.

    Workers start with the first job, and anew in a forked child, where none of them lives on.

    Parameters
    ----------
    n_threads : int, optional
        By default what `default_threads` says.

    Attributes
    ----------
    n_threads : int
    address : int
        Of the team's record, for kernels that share out work.
    lock : RLock
        Held while a job runs: Python threads that share a team take turns.

    Raises
    ------
    OptionError
        If `n_threads` is outside 1..256.
    """

    def __init__(self, n_threads: int | None = None) -> None:
        self.n_threads = default_threads() if n_threads is None else checked_threads(n_threads, "n_threads")
        self._record = np.zeros(layout.T_STATES + self.n_threads * layout.T_STRIDE, np.int64)
        self.address: int = self._record.ctypes.data
        self._run_job = _call("run_team")
        self._alone = False
        self.forget_workers()
        _TEAMS.add(self)

    def run(self, kernel: int, argument: int, alike: bool = False) -> None:
        """Let the threads call the kernel at this address with (argument, thread number).

        Returns when thread 0, the caller, and all that came in time are through; a worker that is late takes no part.
        Jobs that are `alike`, of one kernel and size, are timed, and left to thread 0 alone while that is quicker.
        """
        with self.lock:
            alone: bool = alike and self._alone
            self._fields[layout.T_ALONE] = alone
            if not alone:
                self._wake_workers()
            began = time.perf_counter()
            self._run_job(self.address, kernel, argument)
            if alike and self._states:
                self._alone = self._pace.send(time.perf_counter() - began)

    def run_series(self, series: Callable[[], Iterable[float]]) -> None:
        """Do the same for alike jobs that compiled code runs in a row: `series` returns what each took, in seconds."""
        with self.lock:
            self._fields[layout.T_ALONE] = alone = self._alone
            if not alone:
                self._wake_workers()
            for seconds in series():
                if self._states and self._alone == alone:  # else those to come were to be done in the other way
                    self._alone = self._pace.send(seconds)

    def forget_workers(self) -> None:
        """Begin without any workers: when made, and in a forked child."""
        self.lock = threading.RLock()
        self._record[:] = 0
        self._record[layout.T_YIELD] = _yield_address()
        self._record[layout.T_PATIENCE] = PATIENCE
        self._fields = self._record.data
        self._states = [layout.T_STATES + thread * layout.T_STRIDE for thread in range(1, self.n_threads)]
        self._beds: list[threading.Semaphore] = []
        self._pace = pace()
        self._alone = next(self._pace)

    def _wake_workers(self) -> None:
        if len(self._beds) < len(self._states):
            self._start_workers()
        for state, bed in zip(self._states, self._beds, strict=True):
            if self._fields[state]:  # parked: it may come too late for this job, but not for the next
                self._fields[state] = 0
                bed.release()

    def _start_workers(self) -> None:
        work = _call("work_for_team")
        self._beds = [threading.Semaphore(0) for _ in self._states]
        for thread, bed in enumerate(self._beds, start=1):
            arguments = (work, self._record, thread, bed)
            threading.Thread(target=_worker, args=arguments, name=f"minigpt-{thread}", daemon=True).start()
        weakref.finalize(self, _dismiss, self._record, self._beds)


def pace() -> Generator[bool, float, None]:
    """Yield whether thread 0 should do the next job alone, and be sent the seconds that it took.

    Where other processes want the processors too, a thread that loses its own inside a chunk holds up the others for
    milliseconds. A window of jobs, some of which took far longer than the quickest, tells of that. The next window is
    done alone; then each is done in the way that was quicker of late, for a while, each time for twice as long. Asking
    again costs a window at most: it ends when that many jobs would be done alone.
    """
    patience, alone = SHORTEST, math.inf
    while True:
        shared = yield from _window(False, WINDOW * alone)
        if len(shared) == WINDOW:
            if mean(shared) <= UNEVEN * min(shared):
                patience, alone = SHORTEST, math.inf
                continue
            alone = mean((yield from _window(True)))
        of_late = {False: mean(shared), True: alone}
        for _ in range(patience):
            quicker = of_late[True] < of_late[False]
            of_late[quicker] = (of_late[quicker] + mean((yield from _window(quicker)))) / 2
        alone, patience = of_late[True], min(2 * patience, LONGEST)


def _window(alone: bool, limit: float = math.inf) -> Generator[bool, float, list[float]]:
    times: list[float] = []
    while len(times) < WINDOW and sum(times) <= limit:
        times.append((yield alone))
    return times


_TEAMS: weakref.WeakSet[Team] = weakref.WeakSet()


def _forget_all_workers() -> None:
    for team in list(_TEAMS):
        team.forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all_workers)


def _worker(work: Callable[[int, int], int], record: NDArray[np.int64], thread: int, bed: threading.Semaphore) -> None:
    """Work until dismissed; sleep whenever no job came for a while. Must not hold the Team, which could never die."""
    while work(record.ctypes.data, thread):
        bed.acquire()


def _dismiss(record: NDArray[np.int64], beds: list[threading.Semaphore]) -> None:
    """Let the workers go: nobody uses the team any more, or the interpreter ends."""
    record[layout.T_CLOSING] = 1
    for bed in beds:
        bed.release()


def _call(name: str) -> Callable[..., Any]:
    kernel = ops.kernel(name)
    assert kernel is not None, "the NumPy backend has no use for a team"
    return kernel.call


def _yield_address() -> int:
    """Return the address of the system's function that lets other processes run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# How many threads


def default_threads() -> int:
    """Return `MINIGPT_NUM_THREADS`, or the number of physical cores that this process may use.

    Raises
    ------
    OptionError
        If the variable is no integer in 1..256.
    """
    if wanted := os.environ.get("MINIGPT_NUM_THREADS"):
        return checked_threads(wanted, "MINIGPT_NUM_THREADS")
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), int(_quota()), MAX_THREADS))


def checked_threads(value: int | str, name: str) -> int:
    """Return a number of threads as an integer.

    Raises
    ------
    OptionError
        If it is no integer in 1..256; `name` is the option to blame.
    """
    text = str(value).strip()
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise OptionError(f"{name} must be an integer in 1..{MAX_THREADS}, not {value!r}")
    return int(text)


def _siblings(cpu: int) -> str:
    """Name a physical core by the processors that it consists of; two threads on one core gain next to nothing."""
    return _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _quota() -> float:
    """Return how many processors' time the control group allows."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")  # version 2, then version 1
    quota = quota or _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = period or _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():  # neither "max" nor -1 nor missing
        return int(quota) / int(period)
    return MAX_THREADS


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
