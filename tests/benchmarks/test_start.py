"""Fresh processes of the comparison: one that fails says why."""

from pathlib import Path

import pytest

from benchmarks.peers.client import WorkerError
from benchmarks.peers.start import generate_once
from benchmarks.peers.workloads import Request


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    reason = r"ended with status 2: error: .*no such file, directory or bundled recipe"
    with pytest.raises(WorkerError, match=reason):
        generate_once(tmp_path / "gone", 1, Request(((1, 2),), 8))
