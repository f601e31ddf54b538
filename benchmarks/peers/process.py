"""What /proc says of a process and of the machine: memory at its peak, and who had the CPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def family(root: int) -> set[int]:
    """The ids of a process and of all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def peak_rss_bytes(root: int) -> int:
    """The peaks of resident memory (VmHWM) of a process and its descendants, summed."""
    return sum(peak for pid in family(root) for peak in _peak(pid))


def cpu_seconds(root: int) -> float:
    """Time that a process and its living descendants had a CPU, all threads."""
    fields = [stat for pid in family(root) if (stat := _stat(pid))]
    return sum(int(f[11]) + int(f[12]) for f in fields) / _TICKS


@dataclass(frozen=True, slots=True)
class CpuClock:
    """A moment: since the start of the machine, CPU seconds of all, and of one family."""

    wall: float
    busy: float
    own: float

    @staticmethod
    def read(root: int) -> CpuClock:
        """Now. Time that the hypervisor gave to others counts as busy."""
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, soft_irq, steal = (int(f) for f in fields[:8])
        busy = (user + nice + system + irq + soft_irq + steal) / _TICKS
        return CpuClock(time.monotonic(), busy, cpu_seconds(root))

    def share_of_others(self, end: CpuClock) -> float:
        """Of the machine's CPU time until `end`, what went to anyone but the family."""
        whole = (end.wall - self.wall) * (os.cpu_count() or 1)
        others = (end.busy - self.busy) - (end.own - self.own)
        return min(1.0, max(0.0, others / whole))  # the parts are counted in ticks of 10 ms


def _stat(pid: int) -> list[str] | None:
    """The fields behind the name in /proc/PID/stat, or None where it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rsplit(")", 1)[1].split()


def _peak(pid: int) -> Iterator[int]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            yield int(line.split()[1]) * 1024
