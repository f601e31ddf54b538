"""Which replica gets a request: a policy chooses among those that are ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol, get_args

from ...ir.errors import UsageError
from .policy_names import PolicyName

STREAM_TOKENS: Final = 32
"""What a request that is being answered counts, in tokens of a prompt that are to be computed."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that is ready. `work` counts tokens that it has yet to compute, as expected."""

    index: int
    work: int


class Policy(Protocol):
    """Chooses a replica for each request; used by one thread."""

    def choose(self, prompt: Sequence[int], salt: str, candidates: Sequence[Candidate]) -> int:
        """The index of one of the candidates, of which there is at least one."""


class LeastLoaded:
    """The replica with the least work; the first of several."""

    def choose(self, prompt: Sequence[int], salt: str, candidates: Sequence[Candidate]) -> int:
        """As `Policy`."""
        return min(candidates, key=lambda each: (each.work, each.index)).index


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, prompt: Sequence[int], salt: str, candidates: Sequence[Candidate]) -> int:
        """As `Policy`."""
        indices = sorted(each.index for each in candidates)
        self._last = next((i for i in indices if i > self._last), indices[0])
        return self._last


class AnyOf:
    """Any, at random."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = Random(seed)

    def choose(self, prompt: Sequence[int], salt: str, candidates: Sequence[Candidate]) -> int:
        """As `Policy`."""
        return self._random.choice(candidates).index


_POLICIES: dict[str, Callable[[], Policy]] = {
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
    "random": AnyOf,
}


def policy_of(name: str) -> Policy:
    """The policy of that name. Raises UsageError for another one."""
    if name not in _POLICIES:
        known = ", ".join(get_args(PolicyName))
        raise UsageError(f"there is no routing policy {name!r}", hint=f"use one of {known}")
    return _POLICIES[name]()
