"""How much memory of their own processes have touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..executors.base import HOST

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessMemory:
    """Of engine processes, for whoever plans beside them. What files back is not counted."""

    def __init__(self, pids: Callable[[], Iterable[int | None]]) -> None:
        self._pids = pids

    def touched_bytes(self) -> dict[str, int]:
        """As `ReportsMemory`."""
        return {HOST: sum(private_bytes(pid) for pid in self._pids() if pid is not None)}


def private_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 for one that has ended."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE_BYTES
