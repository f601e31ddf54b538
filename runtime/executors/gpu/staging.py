"""Memory of the host that copies read and write while the host goes on, in turn for each step."""

from __future__ import annotations

from typing import Final

import numpy as np

from .driver import Bytes, Driver

_ALIGNMENT: Final = 64


class PinnedBuffer:
    """Pinned memory that grows: what is taken for a step, one piece behind the other."""

    def __init__(self, driver: Driver, num_bytes: int) -> None:
        self._driver = driver
        self._memory = driver.host_array(max(num_bytes, _ALIGNMENT))
        self._used = 0

    def reserve(self, num_bytes: int) -> None:
        """Begin a step that takes at most so much, once that before it has ended."""
        self._used = 0
        if num_bytes > len(self._memory):
            larger = self._driver.host_array(max(num_bytes, 2 * len(self._memory)))
            self._driver.free_host_array(self._memory)
            self._memory = larger

    def take(self, num_bytes: int) -> Bytes:
        """So many bytes, which nobody else takes until `reserve` is called."""
        begin = self._used
        self._used = begin + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        assert begin + num_bytes <= len(self._memory), "more than was reserved"
        return self._memory[begin : begin + num_bytes]


def room(*num_bytes: int) -> int:
    """What taking pieces of these sizes takes."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in num_bytes)


class GrowingArray:
    """An array on the device without a bound of its own; it moves when it has become too small."""

    def __init__(self, driver: Driver, name: str, num_bytes: int) -> None:
        self._driver, self._name = driver, name
        self._bytes = max(256, num_bytes)
        self.address = driver.allocate(self._bytes, name)

    @property
    def num_bytes(self) -> int:
        """What it has room for."""
        return self._bytes

    def make_room(self, num_bytes: int) -> bool:
        """Have room for so much; whether it moved. What was in it is lost then."""
        if num_bytes <= self._bytes:
            return False
        size = max(num_bytes, 2 * self._bytes)
        address = self._driver.allocate(size, self._name)
        self._driver.synchronize()  # steps in flight may still read what it had
        self._driver.free(self.address)
        self.address, self._bytes = address, size
        return True


def raw(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Bytes:
    """The bytes of an array, in its order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
