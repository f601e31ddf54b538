"""Global memory: allocations by name, with bounds, alignment and poisoned contents."""

from __future__ import annotations

import mmap
import sys
from bisect import bisect_right, insort
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError

Array = NDArray[Any]

BASE: Final = 0x7E00_0000_0000
"""The first address; nothing real lies there."""

ALIGNMENT: Final = 256
GAP: Final = 4096
"""Bytes between allocations that belong to none."""

_UNRESERVED: Final = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python names from 3.13 on: the host need not have what is never used."""

POISON: Final = 0xFF
"""What fresh memory is filled with: NaN in every format of floats."""


@dataclass(frozen=True, slots=True, order=True)
class Allocation:
    """Bytes from `start` to `end`; `name` says what they are for."""

    start: int
    end: int
    name: str


class Memory:
    """The memory of a device of so many bytes, at made-up addresses.

    The pages of the host behind it are taken when they are first used.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.used_bytes = 0
        # Gaps and freed places need room beside what the device has.
        self._room = 4 * num_bytes + (1 << 28)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _UNRESERVED
        self._pages = mmap.mmap(-1, self._room, flags=flags)
        self._bytes = np.frombuffer(self._pages, np.uint8)
        self._views: dict[tuple[int, int], Array] = {}
        self._next = 0
        self.allocations: list[Allocation] = []
        self._starts: list[int] = []
        self.written: set[Allocation] = set()
        """What kernels have written since this was last cleared."""

    def allocate(self, num_bytes: int, name: str) -> int:
        """The address of fresh, poisoned memory; MemoryError where the device has too little."""
        if num_bytes < 1:
            raise EmulationError(f"{name}: an allocation of {num_bytes} bytes")
        if self.used_bytes + num_bytes > self.num_bytes:
            raise MemoryError(name)
        begin = self._place(num_bytes)
        allocation = Allocation(BASE + begin, BASE + begin + num_bytes, name)
        insort(self.allocations, allocation)
        self._starts = [one.start for one in self.allocations]
        self.used_bytes += num_bytes
        self._bytes[begin : begin + num_bytes] = POISON
        return allocation.start

    def _place(self, num_bytes: int) -> int:
        """Addresses are not used again while there are others: late accesses must be seen."""
        length = -(-(num_bytes + GAP) // ALIGNMENT) * ALIGNMENT
        if self._next + length <= self._room:
            self._next += length
            return self._next - length
        begin = 0
        for one in self.allocations:
            if one.start - BASE - begin >= length:
                return begin
            begin = -(-(one.end - BASE + GAP) // ALIGNMENT) * ALIGNMENT
        if begin + length > self._room:
            raise MemoryError("no gap is long enough")
        return begin

    def free(self, address: int) -> None:
        """Give back what was allocated at an address."""
        place = bisect_right(self._starts, address) - 1
        if place < 0 or self._starts[place] != address:
            raise EmulationError(f"{address:#x} is freed, and no allocation begins there")
        allocation = self.allocations.pop(place)
        self._starts.pop(place)
        self.used_bytes -= allocation.end - allocation.start
        begin = allocation.start - BASE
        self._bytes[begin : begin + allocation.end - allocation.start] = POISON

    def region(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        """The bytes themselves, which must lie in one allocation."""
        if num_bytes:
            self._check_each(np.array([address], np.uint64), num_bytes, write=False)
        begin = address - BASE
        return self._bytes[begin : begin + num_bytes]

    def load(self, addresses: Array, num_bytes: int, element_bytes: int) -> Array:
        """`[..., num_bytes / element_bytes]` unsigned integers at each address."""
        self.check(addresses, num_bytes)
        places = (addresses - np.uint64(BASE)).view(np.int64) // num_bytes
        found: Array = self._view(num_bytes, element_bytes)[places]
        return found

    def store(self, addresses: Array, values: Array) -> None:
        """Unsigned integers `[..., count]` to each address, `count` of them side by side."""
        num_bytes = values.shape[-1] * values.itemsize
        self.check(addresses, num_bytes, write=True)
        places = (addresses - np.uint64(BASE)).view(np.int64) // num_bytes
        self._view(num_bytes, values.itemsize)[places] = values

    def _view(self, num_bytes: int, element_bytes: int) -> Array:
        view = self._views.get((num_bytes, element_bytes))
        if view is None:
            typed = self._bytes.view(f"u{element_bytes}")
            view = typed.reshape(-1, num_bytes // element_bytes)
            self._views[num_bytes, element_bytes] = view
        return view

    def check(self, addresses: Array, num_bytes: int, *, write: bool = False) -> None:
        """That all accesses are aligned and lie in allocations."""
        if not addresses.size:
            return
        # The low bits of all addresses at once say whether any is misaligned.
        if num_bytes & (num_bytes - 1) == 0:
            low = int(np.bitwise_or.reduce(addresses, axis=None)) & (num_bytes - 1)
            if low and num_bytes <= 16:
                bad = addresses[addresses % np.uint64(num_bytes) != 0]
                raise EmulationError(
                    f"misaligned: {num_bytes} bytes at {self.describe(int(bad.flat[0]))}"
                )
        first, last = int(addresses.min()), int(addresses.max())
        place = bisect_right(self._starts, first) - 1
        if place >= 0 and last + num_bytes <= self.allocations[place].end:
            if write:
                self.written.add(self.allocations[place])
            return
        self._check_each(addresses, num_bytes, write=write)

    def at(self, address: int) -> set[Allocation]:
        """The allocation in which an address lies, if there is one."""
        place = bisect_right(self._starts, address) - 1
        inside = place >= 0 and address < self.allocations[place].end
        return {self.allocations[place]} if inside else set()

    def touched(self, addresses: Array) -> set[Allocation]:
        """The allocations in which addresses lie, which were checked."""
        places = np.searchsorted(np.array(self._starts, np.uint64), addresses, side="right") - 1
        return {self.allocations[int(place)] for place in np.unique(places)}

    def _check_each(self, addresses: Array, num_bytes: int, *, write: bool) -> None:
        starts = np.array(self._starts, np.uint64)
        ends = np.array([one.end for one in self.allocations], np.uint64)
        places = np.searchsorted(starts, addresses, side="right") - 1
        outside = places < 0
        if len(ends):
            limit = ends[np.maximum(places, 0)]
            # The first half catches addresses whose sum would pass 2**64.
            outside |= (addresses >= limit) | (addresses + np.uint64(num_bytes) > limit)
        if outside.any():
            bad = int(addresses[outside].min())
            raise EmulationError(
                f"out of bounds: {num_bytes} bytes at {self.describe(bad)} "
                f"({int(outside.sum())} of {addresses.size} accesses)"
            )
        if write:
            self.written |= {self.allocations[int(place)] for place in np.unique(places)}

    def describe(self, address: int) -> str:
        """An address in words."""
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return f"{address:#x}, in no allocation"
        one = self.allocations[place]
        if address < one.end:
            return f"byte {address - one.start} of {one.name!r} ({one.end - one.start} bytes)"
        return f"{address:#x}, {address - one.end} bytes past the end of {one.name!r}"

    def close(self) -> None:
        """Give everything back; the pages go when nothing refers to them any more."""
        self.allocations.clear()
        self._starts.clear()
        self.used_bytes = 0
