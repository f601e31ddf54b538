"""Requests of an engine that died, kept back for its successor."""

from __future__ import annotations

from collections.abc import Sequence

from .replica import Replica
from .streams import RemoteStream

SUCCESSOR_SECONDS = 0.5
"""In which a successor mostly is ready; those that were kept back longer go anywhere."""


class KeptBack:
    """By replica. What the others would compute last, its successor has done before.

    The rest of a request has to be computed from its beginning: if all of them went to engines
    that are left, the last one would wait for all others.
    """

    def __init__(self) -> None:
        self._streams: dict[Replica, list[RemoteStream]] = {}

    def share(
        self, replica: Replica, streams: Sequence[RemoteStream], num_ready: int
    ) -> Sequence[RemoteStream]:
        """Keep the part of the successor; the others, which go on at once.

        With `num_ready` 0, nothing is kept: no other engine is ready, or no successor will be soon.
        """
        if not num_ready:
            return streams
        num_now = -(-len(streams) * num_ready // (num_ready + 1))
        self._streams.setdefault(replica, []).extend(streams[num_now:])
        return streams[:num_now]

    def release(self, replica: Replica) -> list[RemoteStream]:
        """Those that were kept back for it, and have not ended."""
        return [stream for stream in self._streams.pop(replica, []) if not stream.is_over]
