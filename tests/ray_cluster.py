"""Ray on this machine, for the tests of one module."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock


@contextlib.contextmanager
def cluster_alone(**options: Any) -> Iterator[None]:
    """A cluster of its own, while no other test has one: two would share processors and ports."""
    with FileLock(Path(tempfile.gettempdir()) / "infc-tests-ray.lock"):
        room = tempfile.mkdtemp(prefix="ray")  # the paths of sockets must be short
        try:
            ray.init(
                address="local",  # else that of whoever has started one on this machine
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=room,
                **options,
            )
            yield
        finally:
            ray.shutdown()  # which ends the processes of Serve at once
            shutil.rmtree(room, ignore_errors=True)
