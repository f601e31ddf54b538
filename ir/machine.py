"""What this process may use of its machine: processors and memory, less what a container takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNLIMITED = 1 << 60  # version 1 writes "no limit" as the largest multiple of a page


def available_cpus() -> int:
    """Processors that this process may keep busy: by affinity, and by its groups' quotas.

    A quota of two and a half processors counts as two: a team of three would be halted, all of
    it, for a sixth of the time.
    """
    count = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return count if quota is None else min(count, max(1, int(quota)))


def cpu_model() -> str:
    """What the processor calls itself, with the numbers that tell its generation."""
    found: dict[str, str] = {}
    for line in _read(_PROC / "cpuinfo").partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        found[name.strip()] = value.strip()
    numbers = [found.get(name, "?") for name in ("cpu family", "model", "stepping")]
    return f"{found.get('model name', 'unknown')} ({'.'.join(numbers)})"


def largest_cache_bytes() -> int:
    """Bytes of the largest cache that the first processor sees; 0 where the system says nothing."""
    sizes = [_read(place / "size").strip() for place in sorted(_CACHES.glob("index*"))]
    scales = {"K": 1 << 10, "M": 1 << 20}
    return max(
        (int(s[:-1]) * scales[s[-1]] for s in sizes if s[-1:] in scales and s[:-1].isdigit()),
        default=0,
    )


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control groups."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read(_PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return max(0, min([free, *(limit - used for limit, used in _memory_limits())]))


def huge_page_setting() -> str | None:
    """The setting of transparent huge pages (always, madvise, never); None without them."""
    try:
        text = _HUGE_PAGES.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0]


def cpu_quota() -> float | None:
    """Processors' worth of time that the control groups allow, the least of them; None: no limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (`cpu.max`) and, for version 1,
    https://docs.kernel.org/scheduler/sched-bwc.html (`cpu.cfs_quota_us`).
    """
    quotas = []
    for place in _groups(None):
        quota, _, period = _read(place / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    for place in _groups("cpu"):
        spent, length = (_number(place / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if spent and length:
            quotas.append(spent / length)
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Bytes that the control groups allow, the least of them; None where there is no limit."""
    return min((limit for limit, _ in _memory_limits()), default=None)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every control group that has a limit."""
    names = ("memory.max", "memory.current", "inactive_file")
    old_names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for controller, (limit_name, used_name, cached_name) in ((None, names), ("memory", old_names)):
        for place in _groups(controller):
            limit, used = _number(place / limit_name), _number(place / used_name)
            if limit is None or used is None or limit >= _UNLIMITED:
                continue
            # What the group caches of files can be taken back, as in MemAvailable.
            cached = re.search(rf"^{cached_name} (\d+)$", _read(place / "memory.stat"), re.M)
            yield limit, used - (int(cached[1]) if cached else 0)


def _groups(controller: str | None) -> Iterator[Path]:
    """This process's control group and those around it; None is the hierarchy of version 2."""
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controller is None and not controllers:
            roots = [_CGROUPS, _CGROUPS / "unified"]
        elif controller is not None and controller in controllers.split(","):
            roots = [_CGROUPS / controller, _CGROUPS / controllers]
        else:
            continue
        root = next((root for root in roots if root.is_dir()), None)
        if root is not None:
            # In a container the name may be the host's, which is not there; the root is.
            place = Path(os.path.normpath(f"{root}/{name}"))
            inside = place.is_relative_to(root)
            above = [p for p in place.parents if p.is_relative_to(root)] if inside else [root]
            yield from (p for p in ([place] if inside else []) + above if p.is_dir())


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
