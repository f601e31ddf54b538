"""Which replica gets a request: a policy chooses among those that are ready."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple, Protocol, get_args

from ...ir.errors import UsageError
from .policy_names import PolicyName
from .prefixes import PrefixIndex

STREAM_TOKENS: Final = 32
"""What a request that is being answered counts, in tokens of a prompt that are to be computed."""

_FOUND_WEIGHT: Final = 2
"""What is computed elsewhere once more takes as much time, and displaces as many blocks there."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that is ready. `work` counts tokens that it has yet to compute, as expected."""

    index: int
    work: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that needs a replica: its prompt, as tokens and digests of its full blocks."""

    num_tokens: int
    digests: Sequence[bytes] = ()
    block_size: int = 1


class Choice(NamedTuple):
    """The index of a replica, and how many tokens of the prompt it need not compute."""

    replica: int
    num_known: int = 0


class Policy(Protocol):
    """Chooses a replica for each request; used by one thread."""

    needs_blocks: bool
    """Whether it wants to know which blocks replicas have."""

    def choose(self, arrival: Arrival, candidates: Sequence[Candidate]) -> Choice:
        """One of the candidates, of which there is at least one."""

    def change(self, index: int, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Take in which blocks a replica has stored and removed."""

    def clear(self, index: int) -> None:
        """A replica has an empty cache now."""


class _Simple:
    """Knows of no blocks."""

    needs_blocks = False

    def change(self, index: int, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """As `Policy`."""

    def clear(self, index: int) -> None:
        """As `Policy`."""


class ByPrefix:
    """The replica that is done first: with the least work, this prompt included.

    What is in its prefix cache is no work. A conversation therefore stays where its beginning is,
    until that replica has more other work than the prompt is worth.
    """

    needs_blocks = True

    def __init__(self) -> None:
        self._indices: defaultdict[int, PrefixIndex] = defaultdict(PrefixIndex)

    def choose(self, arrival: Arrival, candidates: Sequence[Candidate]) -> Choice:
        """As `Policy`."""

        costs = []
        for each in candidates:
            blocks = self._indices[each.index]
            found = blocks.num_found(arrival.digests) * arrival.block_size
            # Of equals the one that has least to lose of its cache.
            gain = _FOUND_WEIGHT * found
            costs.append((each.work - gain, len(blocks), each.index, found))
        *_, index, found = min(costs)
        self._indices[index].expect(arrival.digests)
        return Choice(index, found)

    def change(self, index: int, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """As `Policy`."""
        self._indices[index].change(stored, removed)

    def clear(self, index: int) -> None:
        """As `Policy`."""
        self._indices[index].clear()


class LeastLoaded(_Simple):
    """The replica with the least work; the first of several."""

    def choose(self, arrival: Arrival, candidates: Sequence[Candidate]) -> Choice:
        """As `Policy`."""
        return Choice(min(candidates, key=lambda each: (each.work, each.index)).index)


class RoundRobin(_Simple):
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, arrival: Arrival, candidates: Sequence[Candidate]) -> Choice:
        """As `Policy`."""
        indices = sorted(each.index for each in candidates)
        self._last = next((i for i in indices if i > self._last), indices[0])
        return Choice(self._last)


class AnyOf(_Simple):
    """Any, at random."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = Random(seed)

    def choose(self, arrival: Arrival, candidates: Sequence[Candidate]) -> Choice:
        """As `Policy`."""
        return Choice(self._random.choice(candidates).index)


_POLICIES: dict[str, Callable[[], Policy]] = {
    "prefix": ByPrefix,
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
