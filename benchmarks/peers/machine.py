"""The machine's name and ceilings: read bandwidth and matrix peaks, measured between turns."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

from infc.codegen.cpp.ceilings import build_probe
from infc.ir.machine import cpu_model, largest_cache_bytes
from infc.ir.targets import resolve_target

from .results import CeilingSample

# Memory is read when what is read is several times the largest cache.
READ_BYTES = max(512 << 20, 4 * largest_cache_bytes())


class Ceilings:
    """Measures what the machine gives at the moment: the rates of `infc bench --machine`."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._probe = build_probe(resolve_target("native"))

    def sample(self, round_: int, workload: str) -> CeilingSample:
        """Bandwidth beside decode, peaks beside prefill: the others are left at 0."""
        if workload == "a":
            read = self._probe.read_rate(self._threads, READ_BYTES)
            return CeilingSample(round_, workload, read, 0.0, 0.0)
        bf16, int8 = (self._probe.product_rate(kind, self._threads) for kind in ("bf16", "int8"))
        return CeilingSample(round_, workload, 0.0, bf16, int8)


def describe(threads: int) -> dict[str, str]:
    """What a reader must know to compare with another run."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "CPU": f"{os.cpu_count()} × {cpu_model()}",
        "target": resolve_target("native").name,
        "threads": str(threads),
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }
