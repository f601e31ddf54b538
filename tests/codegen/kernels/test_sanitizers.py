"""The sanitizers are at work in `make sanitize`: they catch a planted fault of each kind."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ... import sanitizers
from .harness import Kernels, kernels

pytestmark = pytest.mark.skipif(not sanitizers.ACTIVE, reason="runs in `make sanitize` alone")


def read_one_beyond(k: Kernels) -> None:
    """The rows of x have one element fewer than the norm is told."""
    x, w, y = np.zeros((3, 33), np.float32), np.ones(33, np.float32), np.zeros((3, 33), np.float32)
    short = x.ravel()[:-1].copy()
    with k.team(1) as team:
        k.call("rms_norm_rows", team, 0, short, 33, w, y, 33, 3, 1, 33, 1e-5)


def read_unaligned(k: Kernels) -> None:
    """The token ids do not lie where such numbers may."""
    room = np.zeros(8 * 3 + 1, np.uint8)
    table, y = np.zeros((2, 8), np.float32), np.zeros((3, 8), np.float32)
    with k.team(1) as team:
        k.call("embed_plain", team, table, room[1:], y, 3, 8)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (read_one_beyond, "heap-buffer-overflow"),
        (read_unaligned, "load of misaligned address"),
    ],
)
def test_a_planted_fault_is_caught(
    fault: Callable[[Kernels], None], report: str, tmp_path: Path
) -> None:
    k = kernels("x86-64-v2", "float")

    def run() -> None:
        os.dup2(os.open(tmp_path / "report", os.O_WRONLY | os.O_CREAT), 2)
        fault(k)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode not in (0, None)
    assert report in (tmp_path / "report").read_text()
