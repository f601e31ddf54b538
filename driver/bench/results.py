"""What was measured, as values: read by people's programs, rendered elsewhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.roofline import Ceilings
from .ops import StepTime
from .workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, least and greatest over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values, of which there is one at least."""
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Seconds that half, nine tenths, and 99 of a hundred stayed within; each was measured."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """Of some values by nearest rank; None of none."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (
            ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in (50, 90, 99)
        )
        return cls(p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a round: tokens a second, and the roofline's seconds by those that it took."""

    tokens_per_second: Spread
    roofline: Spread | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """One workload. Seconds where nothing else is said.

    `output` counts new tokens over whole rounds. Where all requests run at once and share nothing,
    `prefill` counts prompt tokens until each has its first token, `decode` new ones from there.
    `tpot` is a request's mean time a token after the first, `itl` from any token to the next,
    `host_step_microseconds` the median of what a step takes outside the executor. A `skipped`
    workload was not measured, for the reason given, or `failed` for it.
    """

    workload: Workload
    skipped: str | None = None
    failed: bool = False
    rounds: int = 0
    output: Phase | None = None
    prefill: Phase | None = None
    decode: Phase | None = None
    ttft: Percentiles | None = None
    itl: Percentiles | None = None
    tpot: Percentiles | None = None
    steps: int = 0
    host_step_microseconds: float | None = None
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartResult:
    """A fresh process: seconds from its start to the first token, and the most memory it held."""

    prompt_tokens: int
    seconds: Spread
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Everything that was measured of an artifact.

    `peak_rss_bytes` is what this process held while the workloads ran, mapped weights included.
    Without `ceilings` (no compiler here) nothing is set beside the roofline.
    """

    artifact: str
    identity: str
    model: str
    backend: str
    target: str
    cpu: str
    infc_version: str
    threads: int
    at_once: int
    ceilings: Ceilings | None
    workloads: tuple[WorkloadResult, ...]
    start: StartResult | None
    peak_rss_bytes: int | None
    steps: tuple[StepTime, ...] = ()
