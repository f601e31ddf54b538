"""Requests that may be the reason why engines died, run one at a time in one engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from ..faults import GivenUpError
from .replica import Replica
from .streams import RemoteStream

MOST_STRIKES: Final = 2
"""After so many engines in a row that died without an output of it, a request is isolated."""

POISONOUS: Final = (
    "this request was given up: the engine that computed it failed, and so did the next one at"
    " the same place"
)

_PROVEN_STEPS = 64
"""A request without outputs before its end counts as harmless after so many steps."""


def given_up() -> GivenUpError:
    """The error of a request that makes engines fail."""
    return GivenUpError(POISONOUS)


class Suspects:
    """The requests that wait to be isolated, the one that is, and the replica where.

    Any request of an engine that dies may be the reason. One that was in two of them, without an
    output in between, is isolated: it runs in an engine whose other requests are all known to be
    harmless, and that gets no further ones. If that engine dies as well, the request is the reason.
    """

    def __init__(self) -> None:
        self._waiting: deque[RemoteStream] = deque()
        self._current: RemoteStream | None = None
        self.isolated: Replica | None = None
        """The replica that gets nothing but suspects."""

    def examine(self, replica: Replica, interrupted: Sequence[RemoteStream]) -> list[RemoteStream]:
        """The requests that are known to be the reason, now that an engine has died."""
        poisonous = []
        interrupted = [stream for stream in interrupted if stream.is_sent]
        unproven = [stream for stream in interrupted if not stream.is_proven]
        for stream in interrupted:
            stream.num_strikes += 1
        for stream in unproven:
            if stream.num_strikes < MOST_STRIKES:
                continue
            if unproven == [stream] and (stream is self._current or len(interrupted) == 1):
                poisonous.append(stream)
            elif stream is not self._current:
                self._waiting.append(stream)
        if self._current in poisonous:
            self._current = None
        self.release(replica)
        return poisonous

    def release(self, replica: Replica) -> None:
        """A replica has died: the request that was isolated there waits again."""
        if replica is not self.isolated:
            return
        if self._current is not None and not self._current.is_over:
            self._waiting.appendleft(self._current)
        self._current = self.isolated = None

    def holds(self, stream: RemoteStream) -> bool:
        """Whether it waits here."""
        return stream in self._waiting

    def observe(self, replica: Replica, num_steps: int) -> None:
        """An engine has run so many more steps."""
        if replica is not self.isolated:
            return
        for stream in replica.streams.values():
            stream.num_steps += num_steps
            stream.is_proven = stream.is_proven or stream.num_steps >= _PROVEN_STEPS

    def next(self, ready: Iterable[Replica]) -> RemoteStream | None:
        """The request to be run in `isolated` now; None if there is none, or not yet."""
        if (current := self._current) is not None:
            if not (current.is_over or current.is_proven):
                return None
            current.num_strikes, self._current = 0, None
        while self._waiting and self._waiting[0].is_over:
            self._waiting.popleft()
        if not self._waiting:
            self.isolated = None
            return None
        if self.isolated is None:
            self.isolated = min(ready, key=lambda each: each.candidate.work, default=None)
        if self.isolated is None or self.isolated.state != "ready":
            return None
        if not all(stream.is_proven for stream in self.isolated.streams.values()):
            return None
        self._current = self._waiting.popleft()
        return self._current
