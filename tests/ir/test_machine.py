"""What a process may use: its machine, less what the control groups around it take."""

from pathlib import Path

import pytest

from infc.ir import machine
from infc.ir.machine import available_cpus, available_memory, cpu_quota, memory_limit

GIB = 1 << 30


def write(place: Path, **files: object) -> None:
    """Control files of one group; `cpu_max="..."` becomes `cpu.max`."""
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        controller, _, rest = name.partition("_")
        (place / f"{controller}.{rest}").write_text(f"{text}\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups, empty; `proc/self/cgroup` beside it says where we are."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 67108864 kB\n")
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    return tmp_path / "cgroup"


def be_in(cgroups: Path, lines: str) -> None:
    (cgroups.parent / "proc/self/cgroup").write_text(lines)


def test_this_machine_has_memory_and_processors() -> None:
    assert available_memory() > 1 << 20
    assert available_cpus() >= 1


def test_no_groups_no_limits(cgroups: Path) -> None:
    assert cpu_quota() is None
    assert memory_limit() is None
    assert available_cpus() == 8
    assert available_memory() == 64 * GIB


def test_the_narrowest_group_around_counts(cgroups: Path) -> None:
    be_in(cgroups, "0::/pod/container\n")
    write(cgroups / "pod", cpu_max="250000 100000", memory_max=8 * GIB, memory_current=GIB)
    write(cgroups / "pod/container", cpu_max="max 100000", memory_max="max", memory_current=5)
    assert cpu_quota() == 2.5
    assert available_cpus() == 2
    assert memory_limit() == 8 * GIB
    assert available_memory() == 7 * GIB
    write(cgroups / "pod/container", cpu_max="50000 100000", memory_max=2 * GIB, memory_current=GIB)
    (cgroups / "pod/container/memory.stat").write_text(f"file 9\ninactive_file {GIB // 2}\n")
    assert available_cpus() == 1
    assert memory_limit() == 2 * GIB
    assert available_memory() == GIB * 3 // 2


def test_version_one(cgroups: Path) -> None:
    be_in(cgroups, "4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n")
    unlimited = 9223372036854771712
    write(
        cgroups / "memory/box",
        memory_limit_in_bytes=3 * GIB,
        memory_usage_in_bytes=GIB,
        memory_stat=f"inactive_file 3\ntotal_inactive_file {GIB // 4}",
    )
    write(cgroups / "memory", memory_limit_in_bytes=unlimited, memory_usage_in_bytes=40 * GIB)
    write(cgroups / "cpu/box", cpu_cfs_quota_us=300000, cpu_cfs_period_us=100000)
    write(cgroups / "cpu", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert available_cpus() == 3
    assert memory_limit() == 3 * GIB
    assert available_memory() == 2 * GIB + GIB // 4


@pytest.mark.parametrize("name", ["/host/docker/0123", "/../.."])
def test_in_a_container_the_root_is_ours(cgroups: Path, name: str) -> None:
    """The name is the host's; what is mounted is the container's own group."""
    be_in(cgroups, f"0::{name}\n")
    write(cgroups, cpu_max="400000 100000", memory_max=GIB, memory_current=0)
    assert available_cpus() == 4
    assert available_memory() == GIB


def test_threads_by_default_respect_the_quota(cgroups: Path) -> None:
    from infc.runtime.limits import plan_runtime
    from infc.runtime.options import RuntimeOptions

    from ..runtime.test_limits import served

    be_in(cgroups, "0::/\n")
    write(cgroups, cpu_max="300000 100000")
    assert plan_runtime(served(), RuntimeOptions()).num_threads == 3
    assert plan_runtime(served(), RuntimeOptions(threads=5)).num_threads == 5


def test_the_processor_and_its_largest_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "cache")
    assert machine.cpu_model() == "unknown (?.?.?)"
    assert machine.largest_cache_bytes() == 0
    first = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A B\nstepping\t: 1\n"
    (tmp_path / "cpuinfo").write_text(f"{first}\nprocessor\t: 1\nmodel name\t: C\n")
    assert machine.cpu_model() == "A B (25.17.1)"
    for index, size in enumerate(("32K", "1024K", "32M", "")):
        place = tmp_path / f"cache/index{index}"
        place.mkdir(parents=True)
        (place / "size").write_text(f"{size}\n")
    assert machine.largest_cache_bytes() == 32 << 20
