"""Memory kept back for the moment in which no more is to be had.

Whoever meets that moment frees it: what is being done can then be ended in an orderly way, and the
next request find memory again. It is address space that nobody touches, so it takes none.
"""

from __future__ import annotations

import mmap
import threading

RESERVE_BYTES = 64 << 20
LITTLE_BYTES = 4 << 20
"""Where not even so much more is to be had, the moment has come."""


class MemoryReserve:
    """A piece of memory that is there or has been freed. Thread-safe."""

    def __init__(self, num_bytes: int = RESERVE_BYTES) -> None:
        self._num_bytes = num_bytes
        self._memory: mmap.mmap | None = None
        self._lock = threading.Lock()

    @property
    def is_kept(self) -> bool:
        """Whether the memory is kept back at the moment."""
        return self._memory is not None

    def keep(self) -> bool:
        """Keep the memory back again; whether that could be had."""
        with self._lock:
            if self._memory is None:
                try:
                    self._memory = mmap.mmap(-1, self._num_bytes, mmap.MAP_PRIVATE)
                except (OSError, MemoryError):
                    return False
        self.ease()
        return self._memory is not None

    def ease(self) -> None:
        """Give the memory back where only a little more is to be had; costs microseconds."""
        if self._memory is not None:
            try:
                mmap.mmap(-1, LITTLE_BYTES, mmap.MAP_PRIVATE).close()
            except (OSError, MemoryError):
                self.free()

    def free(self) -> None:
        """Give the memory back, for others to take."""
        with self._lock:
            memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


RESERVE = MemoryReserve()
"""The one of this process: kept while an engine waits for requests (see `AsyncEngine`)."""
