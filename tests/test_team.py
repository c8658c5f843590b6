"""Threads: how many, that jobs are complete, and that nothing hangs when they sleep, fork, share or end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from minigpt import layout, ops, team
from minigpt.errors import OptionError
from minigpt.team import Team, default_threads

if ops.backend() == "numpy":
    pytest.skip("needs the compiled backend", allow_module_level=True)
from numba import cfunc, types

from minigpt.kernels.entry import FAST
from minigpt.kernels.intrinsics import i64
from minigpt.kernels.phases import finish_phase, next_chunk, take_chunk

N_CHUNKS = 40


def count(record, thread):
    """Share out two phases of chunks: add 1 per chunk to the fields 1.. and 41.., of the record (team, fields)."""
    team_address = i64(record)[0]
    phase = 0
    for part in range(2):
        chunk = take_chunk(team_address, phase, N_CHUNKS)
        while chunk >= 0:
            i64(record)[1 + part * N_CHUNKS + chunk] += 1
            chunk = next_chunk(team_address, phase, N_CHUNKS)
        phase = finish_phase(team_address, phase)


@pytest.fixture(scope="module")
def counting():
    return cfunc(types.void(types.int64, types.int64), **FAST)(count)


def run_jobs(crew, counting, n_jobs, alike=False):
    record = np.zeros(1 + 2 * N_CHUNKS, np.int64)
    record[0] = crew.address
    for _ in range(n_jobs):
        crew.run(counting.address, record.ctypes.data, alike)
    assert (record[1:] == n_jobs).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_every_chunk_is_done_once(counting, n_threads):
    run_jobs(Team(n_threads), counting, 300)


def test_jobs_of_thread_0_alone_are_complete(counting, monkeypatch):
    monkeypatch.setattr(team, "WINDOW", 3)
    monkeypatch.setattr(team, "UNEVEN", 0.0)  # any window makes the team try without its workers
    crew = Team(3)
    run_jobs(crew, counting, 100, alike=True)


def paced(seconds, n_jobs):
    """Return what the team decided for each job, where `seconds(alone, job)` is how long one takes."""
    pace = team.pace()
    decisions = [next(pace)]
    for job in range(n_jobs - 1):
        decisions.append(pace.send(seconds(decisions[-1], job)))
    return decisions


def test_work_is_shared_while_jobs_take_alike():
    assert not any(paced(lambda alone, job: 1.0 + job % 2 / 10, 1000))


def test_a_team_that_waits_for_its_processors_leaves_the_work_to_one_thread():
    decisions = paced(lambda alone, job: 2.0 if alone else 1 + 9 * (job % 4 == 0), 3000)
    assert not any(decisions[: team.WINDOW])
    assert sum(decisions[-1000:]) > 900


def test_uneven_work_is_shared_as_long_as_one_thread_is_slower():
    assert sum(paced(lambda alone, job: 8.0 if alone else 1 + 9 * (job % 4 == 0), 3000)[-1000:]) < 100


def test_a_lucky_window_does_not_count_for_long():
    """Sharing takes a third more than one thread, but not in the first window in which it is tried again."""
    tried = 0

    def seconds(alone, job):
        nonlocal tried
        tried = 0 if alone else tried + 1
        return 3.3 if alone else (2 if tried <= team.WINDOW else 4) + 3 * (job % 4 == 0)

    assert sum(paced(seconds, 8000)[-6400:]) > 0.85 * 6400


def test_work_is_shared_again_when_the_others_have_gone():
    decisions = paced(lambda alone, job: 2.0 if alone else 1 + 9 * (job % 4 == 0 and job < 1000), 2000)
    assert any(decisions[:1000])
    assert not any(decisions[-500:])


def test_a_series_is_judged_until_the_team_changes_its_mind():
    crew, told = Team(2), []

    def pace():
        while True:
            told.append((yield len(told) >= 2))

    crew._pace = pace()
    crew._alone = next(crew._pace)
    crew.run_series(lambda: [1.0, 2.0, 3.0])
    assert told == [1.0, 2.0]  # the third was shared, though it should not have been any more
    crew.run_series(lambda: [4.0])
    assert told == [1.0, 2.0, 4.0]
    assert crew._fields[layout.T_ALONE]


def test_workers_park_and_are_woken(counting, monkeypatch):
    monkeypatch.setattr(team, "PATIENCE", 1)
    crew = Team(3)
    for _ in range(5):
        run_jobs(crew, counting, 2)
        while not all(crew._record[layout.T_STATES + layout.T_STRIDE :: layout.T_STRIDE]):
            os.sched_yield()


def test_python_threads_share_a_team(counting):
    crew, failures = Team(2), []

    def use():
        try:
            run_jobs(crew, counting, 100)
        except AssertionError as error:
            failures.append(error)

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_gets_workers_of_its_own(counting):
    crew = Team(2)
    run_jobs(crew, counting, 5)
    with crew.lock:  # as if another thread were in the middle of a job
        child = os.fork()
        if child == 0:
            run_jobs(crew, counting, 5)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    run_jobs(crew, counting, 5)


def test_workers_end_with_their_team(counting):
    crew = Team(2)
    run_jobs(crew, counting, 1)
    workers = [t for t in threading.enumerate() if t.name == "minigpt-1"]
    before = len(workers)
    del crew
    for worker in workers[-1:]:
        worker.join(timeout=60)
    assert len([t for t in workers if t.is_alive()]) < before


def test_the_interpreter_ends_while_workers_are_awake():
    code = "from minigpt.team import Team; team = Team(2); team._start_workers(); print('end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("value", [0, -1, 257, 1.5, "two", "", "1e1"])
def test_bad_numbers_of_threads_are_refused(value):
    with pytest.raises(OptionError, match=r"n_threads must be an integer in 1\.\.256, not"):
        Team(value)


def test_the_environment_decides_first(monkeypatch):
    monkeypatch.setenv("MINIGPT_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.setenv("MINIGPT_NUM_THREADS", "many")
    with pytest.raises(OptionError, match=r"MINIGPT_NUM_THREADS must be an integer in 1\.\.256, not 'many'"):
        default_threads()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"siblings": True}, 4),
    ],
)
def test_default_is_the_cores_that_may_be_used(monkeypatch, files, expected):
    def read(path):
        if path.startswith("/sys/devices"):
            cpu = int(path.split("/cpu")[2].split("/")[0])
            return str(cpu // 2) if "siblings" in files else str(cpu)
        return files.get(path.removeprefix("/sys/fs/cgroup/"), "")

    monkeypatch.delenv("MINIGPT_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(team, "_read", read)
    assert default_threads() == expected
