"""Runs kernels: blocks in lockstep, threads that part, barriers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import access, arithmetic, asynchronous, bits, matrix, mbarriers, warpgroups, warps
from .blocks import Races, Written
from .errors import EmulationError
from .memory import Allocation, Memory
from .ptx import Instruction, Module, read_module
from .shared import Shared
from .wave import DECODERS, Mask, Operands, Source, Step, Wave, both

Array = NDArray[Any]

# Imported for the instructions that they register.
_FAMILIES: Final = (access, arithmetic, asynchronous, bits, matrix, mbarriers, warpgroups, warps)

LOCKSTEP_THREADS: Final = 16384
"""How many threads run at once: more of them share the cost of decoding, and leave the caches."""

MAX_JUMPS = 1_000_000
"""Jumps backward of one wave after which a kernel is said not to end."""

_STEP, _BRANCH, _EXIT, _BARRIER = range(4)


@dataclass(frozen=True, slots=True)
class _Decoded:
    kind: int
    run: Step | None
    predicate: Source | None
    negated: bool
    target: int = 0
    barrier: tuple[Source, Source | None, bool] | None = None


class Program:
    """A kernel that was read and whose instructions are resolved, to be launched many times."""

    def __init__(self, text: str) -> None:
        self.module: Module = read_module(text)
        self.operands = Operands(self.module)
        self.steps = [self._decode(one) for one in self.module.instructions]
        self.granule = _granule(self.module)
        self.written = Written(self.module)

    def _decode(self, instruction: Instruction) -> _Decoded:
        try:
            return self._resolve(instruction)
        except EmulationError as error:
            raise EmulationError(
                f"{self.module.entry}, {instruction.line or 'an unknown line'}: "
                f"{instruction.text[:160]}: {error}"
            ) from None

    def _resolve(self, instruction: Instruction) -> _Decoded:
        name = instruction.parts[0]
        predicate = None
        if instruction.predicate is not None:
            predicate = self.operands.source(instruction.predicate, "pred")
        if name == "bra":
            label = self.module.labels.get(instruction.operands[-1])
            if label is None:
                raise EmulationError(f"there is no label {instruction.operands[-1]!r}")
            return _Decoded(_BRANCH, None, predicate, instruction.negated, label)
        if name in ("ret", "exit"):
            return _Decoded(_EXIT, None, predicate, instruction.negated)
        if name in ("bar", "barrier") and instruction.parts[1] != "warp":
            barrier = self._barrier(instruction)
            return _Decoded(_BARRIER, None, predicate, instruction.negated, 0, barrier)
        if name == "bar":
            return _Decoded(_STEP, lambda wave, mask: None, predicate, instruction.negated)
        decoder = DECODERS.get(name)
        if decoder is None:
            raise EmulationError(f"{instruction.opcode} is not modelled")
        run = decoder(instruction, self.operands)
        return _Decoded(_STEP, run, predicate, instruction.negated)

    def _barrier(self, instruction: Instruction) -> tuple[Source, Source | None, bool]:
        if not {"sync", "arrive"} & set(instruction.parts) or "cluster" in instruction.parts:
            raise EmulationError(f"{instruction.opcode} is not modelled")
        number = self.operands.source(instruction.operands[0], "u32")
        count = None
        if len(instruction.operands) > 1:
            count = self.operands.source(instruction.operands[1], "u32")
        return number, count, "sync" in instruction.parts


def _granule(module: Module) -> int:
    """The bytes of the smallest access to shared memory."""
    smallest = 16
    for one in module.instructions:
        name = one.parts[0]
        if name in ("ld", "st", "atom", "red") and any(p.startswith("shared") for p in one.parts):
            size, count = access.access_bytes(one)
            smallest = min(smallest, size * count)
        elif name == "cp" and "bulk" not in one.parts and len(one.operands) > 2:
            smallest = min(smallest, int(one.operands[2], 0))
    return smallest


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch of a kernel."""

    program: Program
    grid: tuple[int, int, int]
    parameters: bytes
    shared_bytes: int


def run_launch(
    launched: Launched, memory: Memory, *, unsettled: set[Allocation] | None = None
) -> int:
    """Run all blocks; the number of instructions. EmulationError for what a device would not do.

    `unsettled` is given for a launch that begins before those before it have ended: what these have
    written, which may not be touched before the kernel waits for them.
    """
    program = launched.program
    module = program.module
    if len(launched.parameters) < module.parameter_bytes:
        raise EmulationError(
            f"{module.entry} takes {module.parameter_bytes} bytes of parameters, "
            f"and {len(launched.parameters)} are given"
        )
    total = int(np.prod(launched.grid))
    at_once = max(1, LOCKSTEP_THREADS // module.threads)
    steps = 0
    races = None
    if total > 1:
        written = program.written.allocations(launched.parameters, memory)
        races = Races(memory, written, total, module, program.written.granule)
    for first in range(0, total, at_once):
        blocks = np.arange(first, min(total, first + at_once))
        wave = _wave(launched, memory, blocks)
        wave.first_block, wave.races = first, races
        wave.unsettled = None if unsettled is None else set(unsettled)
        with np.errstate(all="ignore"):
            steps += _Run(program, wave).run()
    return steps


def _wave(launched: Launched, memory: Memory, blocks: Array) -> Wave:
    program, module = launched.program, launched.program.module
    threads = module.threads
    shared = Shared(
        len(blocks),
        module.static_bytes + launched.shared_bytes,
        -(-threads // 32),
        program.granule,
        module.instructions,
    )
    width, height, _ = launched.grid

    def everywhere(value: int) -> Array:
        return np.array([[value]], np.uint32)

    def by_block(values: Array) -> Array:
        return values.astype(np.uint32)[:, None]

    thread = np.arange(threads, dtype=np.uint32)[None, :]
    special = {
        "%tid.x": thread,
        "%tid.y": everywhere(0),
        "%tid.z": everywhere(0),
        "%ntid.x": everywhere(threads),
        "%ntid.y": everywhere(1),
        "%ntid.z": everywhere(1),
        "%ctaid.x": by_block(blocks % width),
        "%ctaid.y": by_block(blocks // width % height),
        "%ctaid.z": by_block(blocks // (width * height)),
        "%nctaid.x": everywhere(launched.grid[0]),
        "%nctaid.y": everywhere(launched.grid[1]),
        "%nctaid.z": everywhere(launched.grid[2]),
        "%laneid": thread % np.uint32(32),
        "%warpid": thread // np.uint32(32),
        "%cluster_ctaid.x": everywhere(0),
        "%cluster_ctarank": everywhere(0),
    }
    return Wave(
        blocks=len(blocks),
        threads=threads,
        registers=program.operands.poisoned(),
        special=special,
        parameters=launched.parameters,
        memory=memory,
        shared=shared,
        block=np.arange(len(blocks))[:, None],
        warp=(np.arange(threads) // 32)[None, :],
        lane=(np.arange(threads) % 32)[None, :],
    )


@dataclass(slots=True)
class _Barrier:
    """A barrier that threads wait at: who has arrived, and where those go on that wait."""

    arrived: Array
    waiting: dict[int, Array] = field(default_factory=dict)


class _Run:
    """One wave from the first instruction to the last.

    Threads that part run by their place in the program, the least first, so that they meet again;
    those that wait for others in vain let these go first.
    """

    def __init__(self, program: Program, wave: Wave) -> None:
        self.program, self.wave = program, wave
        self.ready: dict[int, Array] = {}
        self.parked: dict[int, int] = {}
        """Places of threads that waited in vain, and the progress that there was by then."""
        self.barriers: dict[int, _Barrier] = {}
        self.count = 0
        self.backward = 0

    def run(self) -> int:
        """The number of instructions."""
        wave = self.wave
        try:
            self._run()
        except EmulationError as error:
            self._raise(error)
        for name in ("copies", "wgmma", "bulk"):
            groups = wave.state.get(name)
            if name != "copies" and groups is not None and groups.pending:
                wave.place = groups.pending[0][0]
                self._raise(EmulationError("the kernel ends before this was waited for"))
        for barrier in mbarriers.barriers(wave).values():
            if barrier.jobs:
                wave.place = barrier.jobs[0][0]
                self._raise(EmulationError("the kernel ends before this copy was waited for"))
        return self.count

    def _raise(self, error: EmulationError) -> None:
        module = self.program.module
        one = module.instructions[min(self.wave.place, len(module.instructions) - 1)]
        raise EmulationError(
            f"{module.entry}, {one.line or 'an unknown line'}: {one.text[:160]}: {error}"
        ) from None

    def _run(self) -> None:
        wave, steps = self.wave, self.program.steps
        place: int | None = 0
        while place is not None:
            if place >= len(steps):
                place = self._leave()
                continue
            if self.ready:
                place = self._meet(place)
            step = steps[place]
            wave.place = place
            self.count += 1
            mask: Mask = wave.active
            if step.predicate is not None:
                chosen = step.predicate(wave)
                if step.negated:
                    chosen = ~chosen
                if step.kind == _BRANCH:
                    place = self._branch(place, step.target, chosen)
                    continue
                mask = both(mask, chosen)
                assert mask is not None
                if not mask.any():
                    place += 1
                    continue
                if mask.all():
                    mask = None
            if step.kind == _STEP:
                assert step.run is not None
                step.run(wave, mask)
                place += 1
            elif step.kind == _BRANCH:
                place = self._jump(place, step.target)
            elif step.kind == _EXIT:
                place = self._exit(place, mask)
            else:
                place = self._synchronize(place, step, mask)

    # --- threads that part and meet

    def _meet(self, place: int) -> int:
        """Join threads that wait at a place, or change to some that are behind."""
        wave = self.wave
        if place in self.ready and place not in self.parked:
            other = self.ready.pop(place)
            assert wave.active is not None
            active = wave.active | other
            wave.active = None if active.all() and active.shape == self._shape else active
        least = min((one for one in self.ready if one not in self.parked), default=place)
        if least < place:
            self._put(place, wave.active)
            return self._take(least)
        return place

    @property
    def _shape(self) -> tuple[int, int]:
        return (self.wave.blocks, self.wave.threads)

    def _put(self, place: int, mask: Mask) -> None:
        full = np.ones(self._shape, bool) if mask is None else self.wave.full(mask)
        before = self.ready.get(place)
        self.ready[place] = full if before is None else before | full

    def _take(self, place: int) -> int:
        active = self.ready.pop(place)
        self.parked.pop(place, None)
        self.wave.active = None if active.all() else active
        return place

    def _branch(self, place: int, target: int, chosen: Array) -> int | None:
        wave = self.wave
        if wave.active is None:
            taken = chosen
            if taken.all():
                return self._jump(place, target)
            if not taken.any():
                return place + 1
        else:
            taken = wave.active & chosen
            if not taken.any():
                return place + 1
            if (taken == wave.active).all():
                return self._jump(place, target)
        rest = ~chosen if wave.active is None else wave.active & ~chosen
        self._put(target, taken)
        wave.active = rest
        if wave.stalled and target <= place:
            self.parked[target] = wave.progress
            wave.stalled = False
        return place + 1

    def _jump(self, place: int, target: int) -> int | None:
        if target > place:
            return target
        self.backward += 1
        if self.backward > MAX_JUMPS:
            raise EmulationError("the kernel does not end")
        wave = self.wave
        if wave.stalled or (self.ready and self.backward % 4096 == 0):
            self._put(target, wave.active)
            self.parked[target] = wave.progress if wave.stalled else -1
            wave.stalled = False
            return self._leave()
        return target

    def _leave(self) -> int | None:
        """Go on with other threads; None when all have ended."""
        free = [one for one in self.ready if one not in self.parked]
        if free:
            return self._take(min(free))
        for place, progress in sorted(self.parked.items(), key=lambda item: item[1]):
            if progress != self.wave.progress:
                return self._take(place)
        if self.parked:
            what = self.wave.state.get("waits for", "others")
            raise EmulationError(f"waits for {what}; nothing more will come")
        for number, barrier in self.barriers.items():
            if barrier.waiting:
                counts = barrier.arrived.sum(1)
                block = int(np.flatnonzero(counts)[0])
                self.wave.place = min(barrier.waiting) - 1
                raise EmulationError(
                    f"only {int(counts[block])} of {self.wave.threads} threads of a block "
                    f"reach barrier {number}"
                )
        return None

    def _exit(self, place: int, mask: Mask) -> int | None:
        wave = self.wave
        if mask is not None and mask is not wave.active:
            rest = ~mask if wave.active is None else wave.active & ~mask
            if rest.any():
                wave.active = wave.full(rest)
                return place + 1
        wave.progress += 1
        return self._leave()

    # --- barriers

    def _synchronize(self, place: int, step: _Decoded, mask: Mask) -> int | None:
        wave = self.wave
        assert step.barrier is not None
        number_, count, waits = step.barrier
        number = int(number_(wave).flat[0])
        expected = wave.threads if count is None else int(count(wave).flat[0])
        if mask is None and expected == wave.threads and number not in self.barriers:
            wave.shared.barrier(None)
            wave.progress += 1
            return place + 1
        full = wave.full(np.ones((1, 1), bool) if mask is None else mask)
        barrier = self.barriers.setdefault(number, _Barrier(np.zeros(self._shape, bool)))
        barrier.arrived = barrier.arrived | full
        if waits:
            barrier.waiting[place + 1] = barrier.waiting.get(place + 1, False) | full
        counts = barrier.arrived.sum(1)
        if (counts > expected).any():
            raise EmulationError(f"{int(counts.max())} threads reach a barrier of {expected}")
        done = counts == expected
        if done.any():
            self._open(number, barrier, done, expected)
        rest = full & (not waits)
        if mask is not None and wave.active is not mask:
            others = ~full if wave.active is None else wave.full(wave.active) & ~full
            rest = rest | others
        if rest.any():
            self._put(place + 1, rest)
        return self._leave()

    def _open(self, number: int, barrier: _Barrier, done: Array, expected: int) -> None:
        wave = self.wave
        wave.progress += 1
        if expected == wave.threads:
            wave.shared.barrier(done)
        else:
            for block in np.flatnonzero(done):
                warps_ = np.unique(np.flatnonzero(barrier.arrived[block]) // 32)
                wave.shared.join(int(block), warps_)
        for after, waiting in list(barrier.waiting.items()):
            released = waiting & done[:, None]
            if released.any():
                self._put(after, released)
            left = waiting & ~done[:, None]
            if left.any():
                barrier.waiting[after] = left
            else:
                del barrier.waiting[after]
        barrier.arrived = barrier.arrived & ~done[:, None]
        if not barrier.arrived.any():
            del self.barriers[number]


def grid_of(grid: Sequence[int]) -> tuple[int, int, int]:
    """Three sizes of a grid; EmulationError for what a device refuses."""
    whole = (*grid, 1, 1, 1)[:3]
    limits = (2**31 - 1, 65535, 65535)
    if any(not 1 <= size <= limit for size, limit in zip(whole, limits, strict=True)):
        raise EmulationError(f"a grid of {tuple(grid)}")
    return whole  # type: ignore[return-value]


def entry_of(text: str) -> str:
    """The name of a module's kernel, without reading the rest."""
    found = re.search(r"\.entry\s+([\w$]+)", text)
    if found is None:
        raise EmulationError("the PTX has no kernel")
    return found[1]
