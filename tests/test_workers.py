"""What a worker of pytest-xdist may take of the machine."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import torch


def blas_threads() -> int:
    """Threads of the library that numpy multiplies matrices with."""
    np.ones((2, 2)) @ np.ones((2, 2))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (path,) = (path for path in mapped if "openblas" in Path(path).name)
    library = ctypes.CDLL(path)
    for name in ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_"):
        if hasattr(library, name):
            return int(getattr(library, name)())
    pytest.skip("numpy comes with another library")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="not one of several workers")
def test_a_worker_computes_on_one_thread() -> None:
    """In torch and in numpy, however many processors there are."""
    assert torch.get_num_threads() == 1
    assert blas_threads() == 1


def test_long_tests_come_first(request: pytest.FixtureRequest) -> None:
    """So that no worker begins one when nothing is left for the other."""
    slow = [item.get_closest_marker("slow") is not None for item in request.session.items]
    assert slow == sorted(slow, reverse=True)
