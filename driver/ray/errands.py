"""A request on its way to an engine, as its front and the router beside it know it."""

from __future__ import annotations

import time

from ...runtime.replicas.routing import STREAM_TOKENS, Arrival


class Errand:
    """Who receives it gets `payload` alone: the rest stays in the process that sends it.

    The front and the router share it: they run on two threads of one process, and each attribute
    has one of them as its writer.
    """

    __slots__ = (
        "arrival",
        "is_accepted",
        "is_over",
        "is_proven",
        "num_known",
        "payload",
        "replica",
        "tried_at",
        "was_silent",
    )

    def __init__(self, payload: bytes, arrival: Arrival) -> None:
        self.payload = payload
        self.arrival = arrival
        self.is_proven = False
        """Whether its engine has told something of it; the front's."""
        self.is_over = False
        """Whether nothing more comes of it; the front's."""
        self.was_silent = False
        """Whether it was given up because its engine said nothing for too long; the front's."""
        self.replica: str | None = None
        """Where it was sent, or is about to be; the router's."""
        self.is_accepted = False
        """Whether an engine has taken it; the router's."""
        self.num_known = 0
        """Tokens of its prompt that its engine need not compute; the router's."""
        self.tried_at = time.monotonic()
        """When a replica was chosen last; the router's."""

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (self.payload,)

    @property
    def work(self) -> int:
        """Tokens that its engine has yet to compute, as expected."""
        unread = 0 if self.is_proven else max(0, self.arrival.num_tokens - self.num_known)
        return unread + STREAM_TOKENS
