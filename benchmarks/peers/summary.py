"""Figures from samples: medians with their spread, ratios round by round, shares of ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .results import START, CeilingSample, Sample, ShapeRun


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, the least and the greatest of them, and how many there were."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """None where there are no values."""
    found = list(values)
    if not found:
        return None
    return Spread(statistics.median(found), min(found), max(found), len(found))


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a sample. `unit` is what a table says; `digits` behind the point there."""

    key: str
    title: str
    workload: str
    value: Callable[[Sample], float]
    more_is_better: bool = True
    digits: int = 0


def _decode_rate(sample: Sample) -> float:
    return (sample.tokens - 1) / (sample.seconds - sample.first)


def _output_rate(sample: Sample) -> float:
    return sample.tokens / sample.seconds


PREFILL_TOKENS = 512

METRICS: Mapping[str, Metric] = {
    m.key: m
    for m in (
        Metric("decode", "decode, tok/s", "a", _decode_rate, digits=1),
        Metric("prefill", "prefill 512, tok/s", "b", lambda s: PREFILL_TOKENS / s.first),
        Metric("batch8", "32 × (128+64), 8 at once, out tok/s", "c8", _output_rate),
        Metric("batch32", "32 at once", "c32", _output_rate),
        Metric("prefix", "32 × (384 shared+16+16), out tok/s", "d", _output_rate),
        Metric("start", "start → first token, s", START, lambda s: s.first, False, 2),
    )
}


def by_round(run: ShapeRun, contestant: str, metric: Metric) -> dict[int, float]:
    """The figure of each round in which the contestant had its turn."""
    return {
        sample.round: metric.value(sample)
        for sample in run.samples
        if sample.contestant == contestant and sample.workload == metric.workload
    }


def ratio(run: ShapeRun, ours: str, theirs: str, metric: Metric) -> Spread | None:
    """Ours over theirs, round by round; None where no round has both."""
    one, other = by_round(run, ours, metric), by_round(run, theirs, metric)
    return spread(one[r] / other[r] for r in sorted(one.keys() & other.keys()))


def share(run: ShapeRun, contestant: str, metric: Metric) -> Spread | None:
    """Of the ceiling of the same round: bandwidth in decode, the matrix peak in prefill.

    The peak is that of int8 for all fewer bits too, as products are then of int8.
    """
    entrant = run.entrants[contestant]
    if metric.key == "decode":
        amount = float(entrant.weight_bytes)
        ceilings = _ceilings(run, "a", lambda c: c.read_bytes_per_s)
    elif metric.key == "prefill":
        amount = run.facts.prefill_operations / PREFILL_TOKENS
        wide = entrant.bits > 8
        ceilings = _ceilings(run, "b", lambda c: c.bf16_per_s if wide else c.int8_per_s)
    else:
        return None
    rates = by_round(run, contestant, metric)
    return spread(rates[r] * amount / ceilings[r] for r in sorted(rates.keys() & ceilings.keys()))


def _ceilings(
    run: ShapeRun, workload: str, rate: Callable[[CeilingSample], float]
) -> dict[int, float]:
    """The best of each round: what the machine could give while it lasted."""
    best: dict[int, float] = {}
    for sample in run.ceilings:
        if sample.workload == workload:
            best[sample.round] = max(best.get(sample.round, 0.0), rate(sample))
    return best


def ceiling_spread(
    run: ShapeRun, workload: str, rate: Callable[[CeilingSample], float]
) -> Spread | None:
    """The ceilings of all rounds."""
    return spread(_ceilings(run, workload, rate).values())


def bits_per_weight(run: ShapeRun, contestant: str) -> float:
    """Bits that a weight of the products takes, scales included."""
    return 8 * run.entrants[contestant].weight_bytes / run.facts.matrix_elements


def peak_rss_bytes(run: ShapeRun, contestant: str, *, alone: bool) -> int | None:
    """The peak of the resident worker: before its first batch (`alone`), or of the whole run."""
    mine = [s for s in run.samples if s.contestant == contestant and s.workload != START]
    if alone:
        batches = (i for i, s in enumerate(mine) if s.workload not in ("a", "b"))
        mine = mine[: next(batches, len(mine))]
    return max((s.peak_rss_bytes for s in mine), default=None)


def best_peer(run: ShapeRun, metric: Metric, bits: int | None = None) -> str | None:
    """The peer whose median is best, of those with so many bits, or of all."""
    medians = {
        name: found.median
        for name, entrant in run.entrants.items()
        if not entrant.is_infc
        and bits in (None, entrant.bits)
        and (found := spread(by_round(run, name, metric).values()))
    }
    choose = max if metric.more_is_better else min
    return choose(medians, key=lambda name: medians[name], default=None)
