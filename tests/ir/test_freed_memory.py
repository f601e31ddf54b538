"""Memory that large blocks leave behind: used again within, given back afterwards."""

from __future__ import annotations

import os
import resource

from infc.ir.freed_memory import kept_for_reuse

BYTES = 64 << 20


def faults_of_a_block() -> int:
    """Pages that making and freeing one block asks the system for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    len(b"x" * BYTES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_next_block_takes_the_memory_of_the_one_before() -> None:
    with kept_for_reuse():
        faults_of_a_block()
        again = min(faults_of_a_block() for _ in range(3))
        held = resident_bytes()
    assert again < 100
    assert resident_bytes() < held - BYTES // 2
