"""What engines take of each kind of memory, and the broker between those of one process.

Memory is committed when it is touched first. What an engine has planned and not touched yet still
looks free to the system, and so to the next engine that plans.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from .executors.base import HOST, Executor, ReportsMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of one kind of memory that an engine takes at most.

    `handed_over` are the rows of one step, logits and hidden states, in float32. `mapped` are
    weights that are read where the file system keeps them: shared with whoever else reads the
    file, and given back by the system when memory is short, so that they are not taken.
    """

    weights: int = 0
    kv: int = 0
    arena: int = 0
    handed_over: int = 0
    mapped: int = 0

    @property
    def taken(self) -> int:
        """What is the engine's own."""
        return self.weights + self.kv + self.arena + self.handed_over


MemoryPlan = Mapping[str, MemoryUse]
"""By kind of memory."""


class Lease:
    """The memory of one engine, from its plan to its end, which is also when nobody holds it."""

    def __init__(self, broker: MemoryBroker, plan: MemoryPlan) -> None:
        self._broker, self._plan = broker, plan
        self._executor: Executor | ReportsMemory | None = None

    def watch(self, executor: Executor | ReportsMemory) -> None:
        """From now on, count what the executor has touched as taken, where it can tell."""
        self._executor = executor

    def untouched(self, kind: str) -> int:
        """Bytes of a kind that are planned and not touched yet."""
        planned = self._plan.get(kind, MemoryUse()).taken
        if not isinstance(self._executor, ReportsMemory):
            return planned
        return max(0, planned - self._executor.touched_bytes().get(kind, 0))

    def end(self) -> None:
        """The engine is about to give its memory back; a second call does nothing."""
        self._broker.end(self)


class MemoryBroker:
    """Keeps the leases of a process, so that two engines never plan the same memory.

    Thread-safe. An engine plans, takes its lease and loads within one `opening` block.
    """

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all leases and who holds locks, as a forked process has to.

        Its parent's engines cannot run there, and threads that held a lock do not exist there.
        """
        self._opening = threading.RLock()
        self._lock = threading.RLock()  # guards the leases, never for long
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Keeps other threads from planning until the lease watches what was opened.

        What is filled while an engine loads is no longer free, and counts as untouched as well.
        """
        with self._opening:
            yield

    def untouched(self, kind: str = HOST) -> int:
        """Bytes of a kind that engines have planned, and that the system still calls free."""
        with self._lock:
            return sum(lease.untouched(kind) for lease in self._leases)

    def lease(self, plan: MemoryPlan) -> Lease:
        """The lease of what was planned."""
        with self._lock:
            lease = Lease(self, plan)
            self._leases.add(lease)
            return lease

    def end(self, lease: Lease) -> None:
        """Forget a lease; waits for whoever is counting."""
        with self._lock:
            self._leases.discard(lease)


BROKER: Final = MemoryBroker()
"""The one of this process."""

os.register_at_fork(after_in_child=BROKER.start_anew)
