"""One replica: its process, the requests in it, and when it is started again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from ...ir.errors import ArtifactError, InfcError, TargetError
from ..engine import EngineStats
from ..faults import note_fault
from .child import Child, Death, Start, death_of
from .frames import FrameError, FrameReader
from .messages import (
    VERSION,
    Abort,
    FromEngine,
    Imported,
    Open,
    Opening,
    Ready,
    ToEngine,
    Told,
    error_of,
    frame_of,
    from_engine,
)
from .routing import STREAM_TOKENS, Candidate
from .streams import RemoteStream

_LOG = logging.getLogger("infc.runtime")

State = Literal["starting", "opening", "ready", "waiting", "given up"]

MOST_FAILED_STARTS = 5
_FIRST_DELAY_SECONDS = 0.1
_MOST_DELAY_SECONDS = 5.0
_MOST_DELAY_AFTER_KILL_SECONDS = 0.4
_REAP_SECONDS = 2.0
_IMPORT_SECONDS = (
    10.0  # in which a process must have imported everything, and taken `open`, later on
)
_OPEN_SECONDS = 600.0  # in which it must have opened the artifact after that
_NO_STATS = EngineStats(0, 0, 0, 0, 0, 0)


class Owner(Protocol):
    """What a replica tells the front, on the front's thread."""

    def on_ready(self, replica: Replica) -> None:
        """It takes requests."""

    def on_told(self, replica: Replica, told: Told) -> None:
        """Its engine said something."""

    def on_death(self, replica: Replica, death: Death, interrupted: Sequence[RemoteStream]) -> None:
        """Its process has ended, and left these requests."""

    def on_given_up(self, replica: Replica, error: InfcError) -> None:
        """It is not started again."""


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A glance at one replica."""

    index: int
    state: State
    pid: int | None
    num_restarts: int
    num_resumed: int
    """Requests that were continued elsewhere, or by a successor."""
    engine: EngineStats


class Replica(asyncio.Protocol):
    """Belongs to the front's thread. Requests are in it from `send` until they end, or it dies."""

    def __init__(self, index: int, order: Open, start: Start, owner: Owner) -> None:
        self.index = index
        self.state: State = "waiting"
        self.streams: dict[int, RemoteStream] = {}
        self.num_restarts = 0
        self.num_resumed = 0
        self.stats: EngineStats = _NO_STATS
        self.heard_at = 0.0
        self._num_queued = 0  # as the engine told last
        self._last_sent = self._last_counted = -1
        self._past: EngineStats = _NO_STATS  # what processes counted that have ended
        self._order = order
        self._start = start
        self._owner = owner
        self._child: Child | None = None
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._num_failed_starts = 0
        self._has_worked = self._is_up = False
        self._was_ready = False
        self._lost_at = 0.0
        self._failure: InfcError | None = None
        self._is_temporary = False
        self._hung_seconds: float | None = None
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The id of its process, if there is one."""
        return None if self._child is None else self._child.pid

    @property
    def num_sequences(self) -> int:
        """Completions that it has to compute, or is computing."""
        return sum(stream.params.num_choices for stream in self.streams.values())

    @property
    def num_queued(self) -> int:
        """Requests that wait in it, with those of which it has not told yet; on any thread."""
        sent = list(self.streams.items())
        fresh = sum(number > self._last_counted and not each.has_told for number, each in sent)
        return self._num_queued + fresh

    @property
    def candidate(self) -> Candidate:
        """Itself, for a policy."""
        unread = sum(s.num_unread for s in self.streams.values() if not s.is_proven)
        return Candidate(self.index, unread + STREAM_TOKENS * len(self.streams))

    def glance(self) -> ReplicaStats:
        """Counts of about now."""
        state: State = "starting" if self.state == "opening" else self.state
        return ReplicaStats(
            self.index, state, self.pid, self.num_restarts, self.num_resumed, self.stats
        )

    async def start(self) -> None:
        """Start a process, and ask it to open the artifact."""
        if self._is_closed:
            return
        self.state, self.heard_at = "starting", time.monotonic()
        self._reader, self._has_worked, self._is_up = FrameReader(), False, False
        self._failure = self._hung_seconds = None
        self._is_temporary = False
        try:
            self._child = self._start()
            connection = self._child.connection
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=connection)
            self._say(self._order)
        except Exception as error:
            self._give_back()
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._is_temporary = isinstance(error, (OSError, MemoryError))
            failure = InfcError(f"a process cannot be started: {reason}")
            _LOG.warning("replica %d: %s", self.index, failure)
            self._retry(failure, is_own=True)

    def _give_back(self) -> None:
        """End a process that no connection was made to, or that was left in the middle."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.abort()
        if (child := self._child) is not None:
            self._child = None
            child.connection.close()
            child.kill()
            child.process.wait()  # after SIGKILL it ends, whatever it was doing

    def send(self, number: int, stream: RemoteStream) -> None:
        """Ask the engine for a request. Raises FrameError for one that cannot be sent."""
        frame = frame_of(stream.order(number))
        self.streams[number] = stream
        self._last_sent = number
        transport = self._transport
        stream.is_sent = transport is not None and not transport.is_closing()
        if transport is not None and stream.is_sent:
            transport.write(frame)

    def abort(self, number: int) -> None:
        """End a request; the engine tells its last output."""
        self._say(Abort(number))

    def check_silence(self, now: float, hung_seconds: float) -> None:
        """End the process at once if it has said nothing for so long, or does not get ready."""
        # When a server starts, all processes import at once, and no request waits for them.
        starting = _IMPORT_SECONDS if self._was_ready else _OPEN_SECONDS
        limits = {"ready": hung_seconds, "starting": starting, "opening": _OPEN_SECONDS}
        limit = limits.get(self.state)
        if limit is not None and now - self.heard_at > limit:
            self._hung_seconds = limit
            self._kill()

    def forget_killed(self, count: int) -> None:
        """Of so many processes that were killed for lack of memory, its own is none."""
        if self._child is not None and count > self._child.num_killed:
            self._child = replace(self._child, num_killed=count)

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def close(self, seconds: float) -> None:
        """End the process, within a step if it takes no longer, and start no other."""
        self._is_closed = True
        if self._transport is not None:
            self._transport.close()
        if (child := self._child) is not None and not await _has_ended(child, seconds):
            child.kill()
            await _has_ended(child, _REAP_SECONDS)

    def _say(self, message: ToEngine) -> None:
        if self._transport is not None:
            self._transport.write(frame_of(message))

    # --- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio has it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        self.heard_at = time.monotonic()
        try:
            for payload in self._reader.feed(data):
                self._hear(from_engine(payload))
        except FrameError as error:  # what follows cannot be understood
            self._failure = error
            self._kill()
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it: the process ends, or has ended."""
        if self._transport is None:  # given back
            return
        if self.state == "ready":
            self._lost_at = time.monotonic()
        self._transport, self.state = None, "waiting"
        if not self._is_closed:
            self._begin(self._bury())

    def _hear(self, message: FromEngine) -> None:
        if isinstance(message, Told):
            if message.stats is not None:
                s = message.stats
                self._num_queued, self._last_counted = s.num_queued, self._last_sent
                self.stats = EngineStats(
                    s.num_waiting,
                    s.num_running,
                    s.num_free_blocks,
                    s.num_blocks,
                    self._past.num_preemptions + s.num_preemptions,
                    self._past.num_steps + s.num_steps,
                )
            self._has_worked = self._has_worked or bool(message.reports)
            self._owner.on_told(self, message)
        elif isinstance(message, Imported):
            pass  # where it is a spare process, it may have been long ago
        elif isinstance(message, Opening):
            self.state = "opening"
        elif isinstance(message, Ready):
            if message.version != VERSION:
                raise FrameError(f"the engine speaks version {message.version}, not {VERSION}")
            self.state, self._is_up = "ready", True
            if self._was_ready:  # a warning, as the end of its process was one
                seconds = time.monotonic() - self._lost_at
                text = "replica %d: process %d is ready after %.2f s"
                _LOG.warning(text, self.index, self.pid, seconds)
            self._was_ready = True
            self._owner.on_ready(self)
        else:
            self._failure = error_of(message.failure)
            self._is_temporary = message.is_temporary

    # --- the end of a process -----------------------------------------------------------------

    async def _bury(self) -> None:
        """The process has closed its socket: learn why, pass its requests on, start another."""
        child = self._child
        assert child is not None
        if not await _has_ended(child, _REAP_SECONDS):
            child.kill()
            await _has_ended(child, _REAP_SECONDS)
        counted = self.stats
        self._past = replace(
            _NO_STATS, num_preemptions=counted.num_preemptions, num_steps=counted.num_steps
        )
        self._child, self.stats, self._num_queued = None, self._past, 0
        death = death_of(child, hung_seconds=self._hung_seconds)
        if self._failure is not None:
            death = Death(self._failure, True)
        interrupted, self.streams = list(self.streams.values()), {}
        if not self._is_closed:
            self._owner.on_death(self, death, interrupted)
            self._retry(death.error, is_own=death.is_blamed)

    def _retry(self, error: InfcError, *, is_own: bool) -> None:
        """Start again: at once if it has worked, else later and later, and at last not at all."""
        # What has worked, and lacks memory or a file now, may work again at any time.
        may_pass = self._is_temporary and self._was_ready
        # Neither files that are damaged nor a processor that lacks something get better.
        is_final = not may_pass and isinstance(error, (ArtifactError, TargetError))
        # Whoever kills an engine that was ready says nothing of the next one.
        was_good = self._has_worked or (self._is_up and not is_own)
        most = _MOST_DELAY_SECONDS if is_own else _MOST_DELAY_AFTER_KILL_SECONDS
        is_own = is_own and not may_pass
        if was_good and not is_final:
            self._num_failed_starts = 0
        else:
            self._num_failed_starts += 1
        if is_final or (is_own and self._num_failed_starts >= MOST_FAILED_STARTS):
            self.state = "given up"
            self._owner.on_given_up(self, error)
            return
        delay = 0.0
        if self._num_failed_starts:
            delay = min(most, _FIRST_DELAY_SECONDS * 2 ** (self._num_failed_starts - 1))
        self.state = "waiting"
        self.num_restarts += 1
        asyncio.get_running_loop().call_later(delay, lambda: self._begin(self.start()))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        """Run it; a task that nobody holds may be collected."""
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._recover)

    def _recover(self, task: asyncio.Task[None]) -> None:
        """Start again also where a fault of this process ended the task that would have."""
        if task.cancelled() or (error := task.exception()) is None or self._is_closed:
            return
        reason = note_fault(f"replica {self.index}: passing on what it did", error)
        self._give_back()
        self._retry(InfcError(reason), is_own=True)


async def _has_ended(child: Child, seconds: float) -> bool:
    """Whether the process ends within that time."""
    deadline = time.monotonic() + seconds
    while child.process.poll() is None:
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.001)
    return True


def summed(each: Sequence[EngineStats], num_unplaced: int) -> EngineStats:
    """Counts of engines together, with requests that wait for one."""
    return EngineStats(
        num_waiting=sum(stats.num_waiting for stats in each) + num_unplaced,
        num_running=sum(stats.num_running for stats in each),
        num_free_blocks=sum(stats.num_free_blocks for stats in each),
        num_blocks=sum(stats.num_blocks for stats in each),
        num_preemptions=sum(stats.num_preemptions for stats in each),
        num_steps=sum(stats.num_steps for stats in each),
    )
