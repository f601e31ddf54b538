"""Requests that may be the reason why engines died, tried one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from ..faults import GivenUpError
from .replica import Replica
from .streams import RemoteStream

MOST_STRIKES: Final = 2
"""After so many engines in a row that died before they told anything of it, it is suspected."""

POISONOUS: Final = (
    "this request was given up: the engine that computed it failed, and so did the next one at"
    " the same place"
)

_PROVEN_STEPS = 64
"""A request of which nothing is told before its end has proven harmless after so many steps."""


def given_up() -> GivenUpError:
    """What whoever waits for a guilty request is told."""
    return GivenUpError(POISONOUS)


class Suspects:
    """Those that wait for their trial, the one that is tried, and the replica where.

    Of all the requests in an engine that dies, any may be the reason. One that was in two of them,
    without having told anything in between, is tried: by an engine whose other requests have all
    proven harmless there, and that gets no further ones. If that engine dies as well, it was this.
    """

    def __init__(self) -> None:
        self._waiting: deque[RemoteStream] = deque()
        self._tried: RemoteStream | None = None
        self.court: Replica | None = None
        """The replica that gets nothing but suspects."""

    def judge(self, replica: Replica, orphans: Sequence[RemoteStream]) -> list[RemoteStream]:
        """An engine has died, and one of its requests may be the reason: those that are guilty."""
        guilty = []
        unproven = [stream for stream in orphans if not stream.is_proven]
        for stream in orphans:
            stream.num_strikes += 1
        for stream in unproven:
            if stream.num_strikes < MOST_STRIKES:
                continue
            if unproven == [stream] and (stream is self._tried or len(orphans) == 1):
                guilty.append(stream)
            elif stream is not self._tried:
                self._waiting.append(stream)
        if self._tried in guilty:
            self._tried = None
        self.adjourn(replica)
        return guilty

    def adjourn(self, replica: Replica) -> None:
        """A replica has died: whoever was tried there is tried again."""
        if replica is not self.court:
            return
        if self._tried is not None and not self._tried.is_over:
            self._waiting.appendleft(self._tried)
        self._tried = self.court = None

    def holds(self, stream: RemoteStream) -> bool:
        """Whether it waits here."""
        return stream in self._waiting

    def observe(self, replica: Replica, num_steps: int) -> None:
        """An engine has run so many more steps, which nobody in it has died of."""
        if replica is not self.court:
            return
        for stream in replica.streams.values():
            stream.num_steps += num_steps
            stream.is_proven = stream.is_proven or stream.num_steps >= _PROVEN_STEPS

    def next(self, ready: Iterable[Replica]) -> RemoteStream | None:
        """Who is to be tried now by the engine of `court`; None for nobody, or not yet."""
        if (tried := self._tried) is not None:
            if not (tried.is_over or tried.is_proven):
                return None
            tried.num_strikes, self._tried = 0, None
        while self._waiting and self._waiting[0].is_over:
            self._waiting.popleft()
        if not self._waiting:
            self.court = None
            return None
        if self.court is None:
            self.court = min(ready, key=lambda each: each.candidate.work, default=None)
        if self.court is None:
            return None
        if not all(stream.is_proven for stream in self.court.streams.values()):
            return None
        self._tried = self._waiting.popleft()
        return self._tried
