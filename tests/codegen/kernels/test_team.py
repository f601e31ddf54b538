"""The thread team: barriers that hold, threads that sleep, and a clean end."""

import os
import resource
import time

import numpy as np
import pytest

from .harness import Kernels, kernels


@pytest.fixture
def team_kernels() -> Kernels:
    return kernels("x86-64-v2", "float")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_barrier_makes_all_writes_visible(team_kernels: Kernels, threads: int) -> None:
    rounds = 200
    cells = np.zeros(8 * threads, np.int64)
    sums = np.zeros(threads, np.int64)
    with team_kernels.team(threads) as team:
        for _ in range(3):
            cells[:], sums[:] = 0, 0
            team_kernels.call("team_count", team, rounds, cells, sums)
            expected, cell_sum = 0, 0
            for i in range(rounds):
                cell_sum += sum(t + i for t in range(threads))
                expected += cell_sum
            assert sums.tolist() == [expected] * threads


def test_a_thread_that_waits_at_a_barrier_may_do_something(team_kernels: Kernels) -> None:
    calls = np.zeros(1, np.int64)
    with team_kernels.team(2) as team:
        for _ in range(100):  # the other thread may be late, or ahead, by the system's doing
            team_kernels.call("team_wait", team, 40, calls)
            if calls[0] > 0:
                break
    assert calls[0] > 0
    with team_kernels.team(1) as team:
        team_kernels.call("team_wait", team, 0, calls)
    assert calls[0] == 0


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 500])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_only_panels_of_the_threads_own_are_asked_for(
    team_kernels: Kernels, threads: int, rows: int
) -> None:
    found = np.zeros(5, np.int64)
    for outputs, depth in [(1, 1), (40, 7), (896, 896), (4864, 300), (100, 20000)]:
        end = 0
        for thread in range(threads):
            team_kernels.call("ahead", thread, threads, rows, outputs, depth, found)
            start, apart, num_bytes, streams, whole = found.tolist()
            if num_bytes <= 0:
                continue
            assert threads > 1 and 0 < rows < 4
            assert end <= start and num_bytes <= apart
            end = start + apart * (streams - 1) + num_bytes
            assert end <= whole
        if outputs >= 896 and threads > 1 and rows == 1:
            assert end > 0


def test_an_idle_team_uses_no_processor(team_kernels: Kernels) -> None:
    cells, sums = np.zeros(24, np.int64), np.zeros(3, np.int64)
    with team_kernels.team(3) as team:
        team_kernels.call("team_count", team, 1, cells, sums)
        time.sleep(0.01)
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(0.3)
        after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.1, f"{used:.3f} s of processor time in 0.3 s of idling"


def test_a_team_that_never_ran_ends(team_kernels: Kernels) -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        with team_kernels.team(3):
            assert len(os.listdir("/proc/self/task")) == before + 2
    assert len(os.listdir("/proc/self/task")) == before
