"""Whether the kernel has run out of memory lately."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .child import num_killed_for_memory
from .replica import Replica

_SECONDS = 5.0


class MemoryWatch:
    """Forgets processes that the kernel killed for lack of memory some seconds ago.

    Its count is of the whole machine. Without this, whoever kills an engine that has run for days
    would be taken for the kernel, if that has killed anything else since.
    """

    def __init__(self) -> None:
        self._looked_at = time.monotonic()
        self._count = num_killed_for_memory()

    def look(self, replicas: Sequence[Replica]) -> None:
        """To be called several times per second."""
        if (now := time.monotonic()) - self._looked_at < _SECONDS:
            return
        for replica in replicas:
            replica.forget_killed(self._count)
        self._looked_at, self._count = now, num_killed_for_memory()
