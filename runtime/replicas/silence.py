"""Engines that say nothing for too long, and a count that says why others have ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .memory_watch import MemoryWatch
from .replica import Replica


class SilenceWatch:
    """Kills engines of which nothing was heard for `limit` seconds; also has a `MemoryWatch`."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._looked_at = time.monotonic()
        self._memory = MemoryWatch()

    def look(self, replicas: Sequence[Replica], interval: float) -> None:
        """To be called every `interval` seconds."""
        now = time.monotonic()
        # If this process did not run either, nobody's silence means anything.
        was_late = now - self._looked_at > interval + self._limit / 2
        self._looked_at = now
        for replica in replicas:
            if was_late:
                replica.heard_at = now
            replica.check_silence(now, self._limit)
        self._memory.look(replicas)
