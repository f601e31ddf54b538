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
