"""The goals on two Zen 4 cores, as data, and whether a run met them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .results import ShapeRun
from .summary import (
    METRICS,
    best_peer,
    by_round,
    peak_rss_bytes,
    ratio,
    share,
    spread,
)

SAME_BITS, ANY_PEER = "the best peer of these bits", "the best peer"


@dataclass(frozen=True, slots=True)
class Goal:
    """`kind` of the figure: the value itself, its share of the ceiling, its ratio to `against`
    (a contestant, or one of the two names above), or the worker's memory beside each peer's."""

    shape: str
    contestant: str
    metric: str
    kind: Literal["value", "share", "ratio", "memory"]
    bound: float
    against: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`measured` and `met` are None where the run did not measure what the goal needs."""

    goal: Goal
    measured: float | None
    against: str
    met: bool | None


GOALS = (
    Goal("0.5b", "infc-int4", "decode", "share", 0.70),
    Goal("0.5b", "infc-int4", "decode", "ratio", 1.8, "llama.cpp-q4_0"),
    Goal("0.5b", "infc-int8", "decode", "share", 0.78),
    Goal("0.5b", "infc-int8", "decode", "ratio", 2.0, SAME_BITS),
    Goal("0.5b", "infc-bf16", "decode", "share", 0.85),
    Goal("0.5b", "infc-bf16", "decode", "ratio", 1.4, SAME_BITS),
    Goal("1b", "infc-int4", "decode", "ratio", 1.6, SAME_BITS),
    Goal("1b", "infc-int8", "decode", "ratio", 1.7, SAME_BITS),
    Goal("0.5b", "infc-int8", "prefill", "share", 0.75),
    Goal("0.5b", "infc-int8", "prefill", "ratio", 1.35, ANY_PEER),
    Goal("1b", "infc-int8", "prefill", "share", 0.75),
    Goal("1b", "infc-int8", "prefill", "ratio", 1.15, ANY_PEER),
    Goal("0.5b", "infc-int4", "prefill", "ratio", 0.9, "infc-int8"),
    Goal("1b", "infc-int4", "prefill", "ratio", 0.9, "infc-int8"),
    Goal("0.5b", "infc-int8", "batch32", "value", 310),
    Goal("0.5b", "infc-int8", "batch32", "ratio", 1.5, ANY_PEER),
    Goal("1b", "infc-int8", "batch32", "value", 120),
    Goal("1b", "infc-int8", "batch32", "ratio", 1.5, ANY_PEER),
    Goal("0.5b", "infc-int8", "prefix", "value", 300),
    *(
        Goal(shape, "infc-onnx-int4", metric, "ratio", bound, "onnxruntime-int4")
        for shape in ("135m", "0.5b")
        for metric, bound in (("decode", 1.0), ("prefill", 1.3), ("batch8", 1.3), ("batch32", 1.3))
    ),
    *(Goal("0.5b", f"infc-{p}", "start", "value", 0.6) for p in ("int4", "int8", "bf16")),
    *(
        Goal(shape, f"infc-{precision}", "rss", "memory", 1.0, SAME_BITS)
        for shape in ("0.5b", "1b")
        for precision in ("int4", "int8", "bf16")
    ),
)


def judge(goal: Goal, run: ShapeRun) -> Verdict:
    """What the run of the goal's shape says of it. Medians count."""
    if goal.contestant not in run.entrants:
        return Verdict(goal, None, goal.against, None)
    if goal.kind == "memory":
        return _judge_memory(goal, run)
    metric = METRICS[goal.metric]
    against = goal.against
    if goal.kind == "ratio":
        bits = run.entrants[goal.contestant].bits
        if against in (SAME_BITS, ANY_PEER):
            against = best_peer(run, metric, bits if against == SAME_BITS else None) or against
        found = ratio(run, goal.contestant, against, metric)
    elif goal.kind == "share":
        found = share(run, goal.contestant, metric)
    else:
        found = spread(by_round(run, goal.contestant, metric).values())
    if found is None:
        return Verdict(goal, None, against, None)
    met = found.median >= goal.bound if metric.more_is_better else found.median <= goal.bound
    return Verdict(goal, found.median, against, met)


def _judge_memory(goal: Goal, run: ShapeRun) -> Verdict:
    """The peak of the whole run over the least peak of a peer of the same bits: below it."""
    bits = run.entrants[goal.contestant].bits
    peaks = {
        name: peak
        for name, entrant in run.entrants.items()
        if entrant.bits == bits
        and (name == goal.contestant or not entrant.is_infc)
        and (peak := peak_rss_bytes(run, name, alone=False))
    }
    ours = peaks.pop(goal.contestant, None)
    if ours is None or not peaks:
        return Verdict(goal, None, goal.against, None)
    least = min(peaks, key=lambda name: peaks[name])
    measured = ours / peaks[least]
    return Verdict(goal, measured, least, measured < goal.bound)
