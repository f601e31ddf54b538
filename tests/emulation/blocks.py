"""Races between the blocks of a launch, on global memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .descriptors import decode
from .errors import EmulationError
from .memory import Allocation, Memory
from .ptx import Instruction, Module
from .wave import Wave

Array = NDArray[Any]

_BLOCK_BITS: Final = 24
_PLACE_BITS: Final = 20
_MANY: Final = (1 << _BLOCK_BITS) - 1
"""As the block of a stamp: more than one block has read."""


class Written:
    """Which memory a kernel may write to: found once, from the parameters that stores depend on.

    Only there can blocks race, and most of what a kernel reads are weights.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._boxes = any("bulk_group" in one.parts for one in module.instructions)
        self._names: frozenset[str] = frozenset(_written_parameters(module.instructions))
        sizes = [_bytes_of(one) for one in module.instructions]
        self.granule = min((size for size in sizes if size), default=16)
        if self._boxes or any("tensor" in one.parts for one in module.instructions):
            self.granule = 1

    def allocations(self, parameters: bytes, memory: Memory) -> set[Allocation]:
        """The allocations that these parameters let it write to."""
        found = set()
        for one in self._module.parameters:
            raw = parameters[one.offset : one.offset + one.num_bytes]
            if one.num_bytes == 8 and one.name in self._names:
                found |= memory.at(int.from_bytes(raw, "little"))
            elif one.num_bytes >= 128 and self._boxes:
                found |= memory.at(decode(raw[:128]).address)
        return found


def _bytes_of(instruction: Instruction) -> int:
    """The bytes that each thread accesses of global memory; 0 for none."""
    parts = instruction.parts
    if parts[0] in ("ld", "st", "atom", "red") and "global" in parts:
        bits = int(re.sub(r"\D", "", parts[-1].removesuffix("x2")))
        count = next((int(part[1:]) for part in parts if re.match(r"^v\d$", part)), 1)
        return bits // 8 * count
    if parts[:2] == ("cp", "async") and "global" in parts and "bulk" not in parts:
        return int(instruction.operands[2], 0)
    return 0


_TOKEN: Final = re.compile(r"%?[A-Za-z_$][\w$@#]*")


def _written_parameters(instructions: Sequence[Instruction]) -> set[str]:
    """The names that addresses of stores depend on, and all where one depends on none."""
    sources: dict[str, set[str]] = {}
    flows = [flow for one in instructions for flow in _flows(one)]
    changed = True
    while changed:
        changed = False
        for target, read in flows:
            before = sources.setdefault(target, set())
            after = before.union(*(sources.get(name, ()) for name in read))
            # What is no register is the name of a parameter.
            after |= {name for name in read if name.startswith("!")}
            if len(after) > len(before):
                sources[target], changed = after, True
    every = {name.removeprefix("!") for found in sources.values() for name in found}
    written: set[str] = set()
    for one in instructions:
        if one.parts[0] in ("st", "atom", "red") and "global" in one.parts:
            address = one.operands[one.parts[0] == "atom"]
            names = set().union(*(sources.get(name, set()) for name in _TOKEN.findall(address)))
            written |= {name.removeprefix("!") for name in names} or every
    return written


def _flows(one: Instruction) -> Iterator[tuple[str, list[str]]]:
    """Which registers get what follows from which; shared memory is one of them."""
    parts = one.parts
    if not one.operands:
        return
    if parts[0] == "st":
        if "global" not in parts:
            yield "shared", _TOKEN.findall(one.operands[1])
        return
    targets = _TOKEN.findall(one.operands[0])
    read = [name for text in one.operands[1:] for name in _TOKEN.findall(text)]
    if parts[0] == "ld":
        # What is loaded from global memory is no address: infc's kernels follow no pointers there.
        read = [f"!{name}" for name in read] if "param" in parts else []
        if "param" not in parts and "global" not in parts:
            read = ["shared"]
    for target in targets:
        yield target, read


class Races:
    """The last accesses of each place in one launch, and which blocks have seen what of others.

    A block that adds to a counter (or loads, or stores) with release shows what it had done before
    its last barrier of all threads; one that does so with acquire has seen what was shown there.
    """

    def __init__(
        self,
        memory: Memory,
        written: set[Allocation],
        total: int,
        module: Module,
        granule: int,
    ) -> None:
        self._memory, self._total, self._granule = memory, total, granule
        self._instructions = module.instructions
        ordered = sorted(written)
        self._starts = [one.start for one in ordered]
        self._ends = [one.end for one in ordered]
        # Pages of zeros cost nothing until they are used.
        sizes = [-(-(one.end - one.start) // granule) for one in ordered]
        self._writes = [np.zeros(size, np.int64) for size in sizes]
        self._reads = [np.zeros(size, np.int64) for size in sizes]
        self._seen: dict[int, Array] = {}
        self._shown: dict[int, Array] = {}

    def note(self, wave: Wave, addresses: Array, num_bytes: int, *, write: bool) -> None:
        """Accesses by blocks `[blocks, threads]`, or what broadcasts to it."""
        if not addresses.size:
            return
        if addresses.shape[0] != wave.blocks:
            addresses = np.broadcast_to(addresses, (wave.blocks, addresses.shape[-1]))
        blocks = np.broadcast_to(np.arange(wave.blocks)[:, None], addresses.shape)
        self.note_each(wave, addresses.reshape(-1), blocks.reshape(-1), num_bytes, write=write)

    def note_each(
        self, wave: Wave, addresses: Array, blocks: Array, num_bytes: int, *, write: bool
    ) -> None:
        """Accesses by these blocks of the wave, one each; EmulationError where one is a race."""
        if not addresses.size:
            return
        first, last = int(addresses.min()), int(addresses.max())
        for place, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if last < start or first >= end:
                continue
            here, ours = addresses, blocks
            if first < start or last >= end:
                inside = (addresses >= np.uint64(start)) & (addresses < np.uint64(end))
                here, ours = addresses[inside], blocks[inside]
            offsets = (here - np.uint64(start)).view(np.int64)
            self._note(wave, place, offsets, ours, num_bytes, write)

    def _note(
        self, wave: Wave, place: int, offsets: Array, blocks: Array, num_bytes: int, write: bool
    ) -> None:
        count = max(1, num_bytes // self._granule)
        cells = offsets // self._granule
        if count > 1:
            cells = (cells[:, None] + np.arange(count)).reshape(-1)
            blocks = np.repeat(blocks, count)
        clock = wave.shared.order.clock[blocks]
        block = blocks + wave.first_block
        now = (((clock << _PLACE_BITS) | wave.place) << _BLOCK_BITS) | (block + 1)
        writes, reads = self._writes[place], self._reads[place]
        what = "write" if write else "read"
        self._compare(place, cells, writes[cells], block, (what, "write"))
        if write:
            self._compare(place, cells, reads[cells], block, ("write", "read"))
            writes[cells] = now
            # Several blocks that write a place in one instruction leave the stamp of one.
            self._compare(place, cells, writes[cells], block, ("write", "write"))
            return
        before = reads[cells]
        others = (before != 0) & ((before & _MANY) != block + 1)
        reads[cells] = np.where(others, now | _MANY, now)
        after = reads[cells] & _MANY
        several = (after != block + 1) & (after != _MANY)
        if several.any():
            reads[cells[several]] |= _MANY

    def _compare(
        self, place: int, cells: Array, stamps: Array, block: Array, what: tuple[str, str]
    ) -> None:
        """EmulationError where another block's access is not known to have come before."""
        other = (stamps & _MANY) - 1
        suspect = np.flatnonzero((stamps != 0) & (other != block))
        for at in suspect:
            me, who = int(block[at]), int(other[at])
            clock = int(stamps[at]) >> (_PLACE_BITS + _BLOCK_BITS)
            seen = self._seen.get(me)
            if seen is not None:
                known = np.delete(seen, me).min() if who == _MANY - 1 else seen[who]
                if known >= clock:
                    continue
            first = self._instructions[(int(stamps[at]) >> _BLOCK_BITS) & ((1 << _PLACE_BITS) - 1)]
            where = self._memory.describe(self._starts[place] + int(cells[at]) * self._granule)
            name = "several blocks" if who == _MANY - 1 else f"block {who}"
            raise EmulationError(
                f"race: the {what[0]} of {where} by block {me} is not ordered after the {what[1]} "
                f"by {name} at {first.line or 'an unknown line'} ({first.text[:100]})"
            )

    def synchronize(
        self, wave: Wave, addresses: Array, blocks: Array, parts: Sequence[str]
    ) -> None:
        """Accesses that order others, as their semantics say: one after the other."""
        both = "acq_rel" in parts
        shows, sees = both or "release" in parts, both or "acquire" in parts
        if not (shows or sees):
            return
        order = wave.shared.order
        for address, block in zip(addresses.tolist(), blocks.tolist(), strict=True):
            me = block + wave.first_block
            seen = self._seen.setdefault(me, np.zeros(self._total, np.int64))
            shown = self._shown.setdefault(address, np.zeros(self._total, np.int64))
            if sees:
                np.maximum(seen, shown, out=seen)
            if shows:
                np.maximum(shown, seen, out=shown)
                # What other warps have done since the last barrier is not shown.
                alone = wave.shared.warps == 1
                shown[me] = max(shown[me], (order.clock if alone else order.floor)[block])
        if shows and wave.shared.warps == 1:
            for block in np.unique(blocks):
                wave.shared.released(int(block), 0)
