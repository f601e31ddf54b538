"""What a simulation tells: times by percentiles, rates, and what happened on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Times:
    """The mean and percentiles, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[tuple[float, int]]) -> Times:
        """Of values with how often each came."""
        ordered = sorted(values)
        total = sum(count for _, count in ordered)
        found, seen, marks = [], 0, [0.5, 0.9, 0.99]
        for value, count in ordered:
            seen += count
            while marks and seen >= marks[0] * total:
                found.append(value)
                marks.pop(0)
        if len(found) < 3:
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(sum(value * count for value, count in ordered) / total, *found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What happened to all requests of a workload."""

    replicas: int
    """At the beginning."""
    most_replicas: int
    fronts: int
    requests: int
    moved: int
    """Requests that were continued elsewhere, after a replica had died."""
    deaths: int
    seconds: float
    tokens: int
    """Of answers."""
    prompt_tokens: int
    hit_tokens: int
    """Of prompts, that were found in a cache."""
    replica_seconds: float
    busy_seconds: float
    front_seconds: float
    first_token: Times
    gap: Times
    end_to_end: Times
    replica_counts: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    """When there were how many replicas that took requests."""

    @property
    def throughput(self) -> float:
        """Tokens of answers a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Part of the tokens of prompts that was found in a cache."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def busy(self) -> float:
        """Part of their time in which replicas ran steps."""
        return self.busy_seconds / self.replica_seconds if self.replica_seconds else 0.0

    @property
    def front_busy(self) -> float:
        """Part of the time in which a front computed."""
        return self.front_seconds / (self.seconds * self.fronts) if self.seconds else 0.0
