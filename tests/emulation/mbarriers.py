"""Barriers in shared memory (mbarrier), which count arrivals and the bytes of copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .access import chosen_threads
from .errors import EmulationError
from .ptx import Instruction
from .wave import Mask, Operands, Step, Wave, opcode, unknown

Array = NDArray[Any]


@dataclass(slots=True)
class Mbarrier:
    """One barrier. `jobs` are copies that have not landed, by the instructions that asked."""

    count: int
    missing: int
    released: Array
    missing_bytes: int = 0
    phase: int = 0
    jobs: list[tuple[int, Callable[[Mbarrier], None]]] = field(default_factory=list)
    was_tried: bool = False
    """Whether a wait for these copies has failed: the first one does, as it may on a device."""

    def turn(self) -> None:
        """Begin the next phase if this one is complete."""
        if self.missing == 0 and self.missing_bytes == 0:
            self.phase ^= 1
            self.missing = self.count


def barriers(wave: Wave) -> dict[tuple[int, int], Mbarrier]:
    """All of a wave, by block and offset."""
    found: dict[tuple[int, int], Mbarrier] = wave.state.setdefault("mbarriers", {})
    return found


def barrier_at(wave: Wave, block: int, offset: int) -> Mbarrier:
    """One that was initialised."""
    found = barriers(wave).get((block, offset))
    if found is None:
        raise EmulationError(f"no mbarrier was initialised at {offset} of shared memory")
    return found


@opcode("mbarrier")
def _mbarrier(instruction: Instruction, operands: Operands) -> Step:
    parts = instruction.parts
    if parts[1] == "init":
        return _init(instruction, operands)
    if parts[1] == "inval":
        return _inval(instruction, operands)
    if parts[1] in ("arrive", "expect_tx"):
        return _arrive(instruction, operands)
    if parts[1] in ("try_wait", "test_wait") and "parity" in parts:
        return _wait(instruction, operands)
    raise unknown(instruction)


def _init(instruction: Instruction, operands: Operands) -> Step:
    where = operands.address(instruction.operands[0], "shared")
    count = operands.source(instruction.operands[1], "u32")

    def run(wave: Wave, mask: Mask) -> None:
        at, counts = wave.full(where(wave)).reshape(-1), wave.full(count(wave)).reshape(-1)
        for thread in chosen_threads(wave, mask):
            block, number = int(thread) // wave.threads, int(counts[thread])
            if at[thread] % 8:
                raise EmulationError(f"misaligned: an mbarrier at {at[thread]} of shared memory")
            released = np.zeros(wave.shared.warps + 1, np.int64)
            barriers(wave)[block, int(at[thread])] = Mbarrier(number, number, released)

    return run


def _inval(instruction: Instruction, operands: Operands) -> Step:
    where = operands.address(instruction.operands[0], "shared")

    def run(wave: Wave, mask: Mask) -> None:
        at = wave.full(where(wave)).reshape(-1)
        for thread in chosen_threads(wave, mask):
            block, offset = int(thread) // wave.threads, int(at[thread])
            if barrier_at(wave, block, offset).jobs:
                raise EmulationError("the mbarrier still counts a copy that nobody waited for")
            del barriers(wave)[block, offset]

    return run


def _arrive(instruction: Instruction, operands: Operands) -> Step:
    """`arrive` takes a state that nobody reads (`_`), the address, and a count or bytes."""
    parts = instruction.parts
    if "noComplete" in parts or any("cluster" in part for part in parts):
        raise unknown(instruction)
    arrives, expects = "arrive" in parts, "expect_tx" in parts
    texts = instruction.operands[arrives:]
    if arrives and instruction.operands[0] != "_":
        raise unknown(instruction)
    where = operands.address(texts[0], "shared")
    count = operands.source(texts[1] if len(texts) > 1 else "1", "u32")

    def run(wave: Wave, mask: Mask) -> None:
        at, counts = wave.full(where(wave)).reshape(-1), wave.full(count(wave)).reshape(-1)
        for thread in chosen_threads(wave, mask):
            block = int(thread) // wave.threads
            barrier = barrier_at(wave, block, int(at[thread]))
            number = int(counts[thread])
            if expects:
                barrier.missing_bytes += number
            if arrives:
                barrier.missing -= 1 if expects else number
                if barrier.missing < 0:
                    raise EmulationError("more arrivals than the mbarrier counts")
                warp = int(thread) % wave.threads // 32
                seen = wave.shared.released(block, warp)
                barrier.released = np.maximum(barrier.released, seen)
            barrier.turn()
        wave.progress += 1

    return run


def _wait(instruction: Instruction, operands: Operands) -> Step:
    target, address, parity = instruction.operands[:3]
    write, where = operands.target(target), operands.address(address, "shared")
    phase = operands.source(parity, "u32")

    def run(wave: Wave, mask: Mask) -> None:
        at, phases = wave.full(where(wave)), wave.full(phase(wave)) & 1
        active = np.ones(at.shape, bool) if mask is None else wave.full(mask)
        passed, again = np.zeros(at.shape, bool), False
        for block in np.flatnonzero(active.any(1)):
            for offset in np.unique(at[block][active[block]]):
                threads = active[block] & (at[block] == offset)
                barrier = barrier_at(wave, int(block), int(offset))
                if _is_first_try(barrier, phases[block][threads]):
                    barrier.was_tried = again = True
                    continue
                passed[block] |= _pass(wave, int(block), int(offset), threads, phases[block])
        if again or (passed | ~active).all():
            wave.stalled = False
        else:
            wave.stalled = True
            wave.state["waits for"] = _missing(wave, at, active & ~passed)
        write(wave, passed, mask)

    return run


def _is_first_try(barrier: Mbarrier, phases: Array) -> bool:
    return bool(barrier.jobs) and not barrier.was_tried and bool((phases == barrier.phase).any())


def _pass(wave: Wave, block: int, offset: int, threads: Array, phases: Array) -> Array:
    """The threads whose phase is complete; copies land if that is what they wait for."""
    barrier = barrier_at(wave, block, offset)
    if barrier.jobs and (phases[threads] == barrier.phase).any():
        jobs, barrier.jobs = barrier.jobs, []
        barrier.was_tried = False
        place = wave.place
        for asked, job in jobs:
            wave.place = asked
            job(barrier)
        wave.place = place
        row = np.zeros_like(barrier.released)
        row[-1] = wave.shared.order.clock[block]
        barrier.released = np.maximum(barrier.released, row)
        wave.progress += 1
        barrier.turn()
    passed: Array = threads & (phases != barrier.phase)
    if passed.any():
        warps = np.unique(np.flatnonzero(passed) // 32)
        wave.shared.acquire(block, warps, barrier.released)
    return passed


def _missing(wave: Wave, at: Array, stuck: Array) -> str:
    block, thread = np.argwhere(stuck)[0]
    barrier = barrier_at(wave, int(block), int(at[block, thread]))
    return (
        f"the mbarrier at {int(at[block, thread])} of shared memory, "
        f"which lacks {barrier.missing} arrivals and {barrier.missing_bytes} bytes"
    )
