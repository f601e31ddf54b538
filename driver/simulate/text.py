"""Outcomes as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from ...ir.sizes import format_count
from .outcome import Outcome, Times
from .planned import Saturation

_HEAD = (
    "replicas",
    "req/s",
    "tok/s",
    "first token p50/p90/p99",
    "between tokens",
    "hits",
    "busy",
    "front",
)


def render(outcomes: Sequence[Outcome], point: Saturation, *, source: str, rate: float) -> str:
    """For people: a line for each number of replicas, and where a front has no time left."""
    rows = [_HEAD, *(_row(each) for each in outcomes)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEAD))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    asked = f"{outcomes[0].requests} requests, {rate:.4g} a second; steps {source}"
    return "\n".join([asked, "", *lines, "", *_events(outcomes), _saturation(point), ""])


def _row(outcome: Outcome) -> tuple[str, ...]:
    count = str(outcome.replicas)
    if outcome.most_replicas > outcome.replicas:
        count += f"-{outcome.most_replicas}"
    if outcome.fronts > 1:
        count += f" ({outcome.fronts} fronts)"
    return (
        count,
        f"{outcome.requests / outcome.seconds:.1f}",
        f"{outcome.throughput:.0f}",
        _times(outcome.first_token),
        _times(outcome.gap),
        f"{outcome.hit_rate:.0%}",
        f"{outcome.busy:.0%}",
        f"{outcome.front_busy:.0%}",
    )


def _times(times: Times) -> str:
    return " / ".join(_seconds(each) for each in (times.p50, times.p90, times.p99))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _events(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"{format_count(each.replicas, 'replica')}: {format_count(each.deaths, 'death')},"
        f" {format_count(each.moved, 'request')} continued"
        for each in outcomes
        if each.deaths
    ]


def _saturation(point: Saturation) -> str:
    load = f"{point.requests:.0f} requests and {point.tokens:.0f} tokens a second"
    if point.replicas is None:
        return f"a front is busy all the time at {load}, which no number of replicas reaches"
    each = "replica that computes" if point.replicas == 1 else "replicas that compute"
    return f"a front is busy all the time at {load}: {point.replicas} {each} all of it are enough"


def as_json(outcomes: Sequence[Outcome], point: Saturation) -> str:
    """For programs."""
    rows = [
        {
            **asdict(each),
            "throughput": each.throughput,
            "hit_rate": each.hit_rate,
            "busy": each.busy,
            "front_busy": each.front_busy,
        }
        for each in outcomes
    ]
    return json.dumps({"outcomes": rows, "front": asdict(point)}, indent=1)
