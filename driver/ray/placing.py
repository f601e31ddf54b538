"""Which replicas suit a request, by what they hold and have to do; knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...runtime.replicas.prefixes import DIGEST_BYTES
from ...runtime.replicas.routing import STREAM_TOKENS, Candidate, policy_of
from .errands import Errand

DIGESTS: Final = "digests"
"""Where the routing statistics of a replica have the blocks that it holds."""

_SHUN_SECONDS = 30.0
"""How long a replica that said nothing gets requests only where there is no other."""


@dataclass(frozen=True, slots=True)
class Known:
    """A replica, as a router knows it.

    `num_ongoing` counts the requests of all callers, if that is known; `digests` are those of the
    blocks that it held when it told them last, one behind the other.
    """

    name: str
    num_ongoing: int | None = None
    has_room: bool = True
    digests: bytes = b""


class Placing:
    """Chooses by a policy of `infc serve --routing`; belongs to one thread."""

    def __init__(self, policy: str) -> None:
        self._policy = policy_of(policy)
        self._next = 0
        self._indices: dict[str, int] = {}
        self._running: dict[str, list[Errand]] = {}
        self._told: dict[str, bytes] = {}
        self._shunned: dict[str, float] = {}

    def ranked(self, replicas: Sequence[Known], errand: Errand | None) -> list[str]:
        """The names of the replicas, the best one first."""
        self._forget_others({each.name for each in replicas})
        for each in replicas:
            self._learn(each)
        if not replicas:
            return []
        now = time.monotonic()
        trusted = [each for each in replicas if self._shunned.get(each.name, 0.0) <= now]
        preferred = [each for each in trusted if each.has_room] or trusted or list(replicas)
        work = {each.name: self._work(each) for each in replicas}
        order = sorted(
            (each.name for each in replicas),
            key=lambda name: (self._shunned.get(name, 0.0) > now, work[name], name),
        )
        if errand is None:
            return order
        candidates = [Candidate(self._indices[each.name], work[each.name]) for each in preferred]
        choice = self._policy.choose(errand.arrival, candidates)
        best = next(each.name for each in preferred if self._indices[each.name] == choice.replica)
        errand.replica, errand.num_known, errand.tried_at = best, choice.num_known, now
        return [best, *(name for name in order if name != best)]

    def accept(self, name: str, errand: Errand) -> None:
        """A replica has taken a request."""
        errand.replica, errand.is_accepted, errand.tried_at = name, True, time.monotonic()
        self._running.setdefault(name, []).append(errand)

    def _learn(self, replica: Known) -> None:
        name = replica.name
        if name not in self._indices:
            self._indices[name], self._next = self._next, self._next + 1
        kept = []
        for errand in self._running.get(name, ()):
            if errand.was_silent:
                self._shunned[name] = time.monotonic() + _SHUN_SECONDS
            if not errand.is_over:
                kept.append(errand)
        self._running[name] = kept
        before = self._told.get(name, b"")
        if replica.digests is not before and replica.digests != before:
            self._told[name] = replica.digests
            old, new = _cut(before), _cut(replica.digests)
            self._policy.change(self._indices[name], tuple(new - old), tuple(old - new))

    def _forget_others(self, names: set[str]) -> None:
        for name in self._indices.keys() - names:
            self._policy.clear(self._indices.pop(name))
            for known in (self._running, self._told, self._shunned):
                known.pop(name, None)

    def _work(self, replica: Known) -> int:
        """Tokens that it has yet to compute: of requests from here, and, roughly, of others."""
        own = self._running[replica.name]
        others = max(0, (replica.num_ongoing or 0) - len(own))
        return sum(errand.work for errand in own) + STREAM_TOKENS * others


def _cut(digests: bytes) -> set[bytes]:
    size = DIGEST_BYTES
    return {digests[at : at + size] for at in range(0, len(digests), size)}
