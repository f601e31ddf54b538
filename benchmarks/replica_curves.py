"""Simulated fleets of 1 to 1000 replicas, as tables and as a drawing.

    python -m benchmarks.replica_curves OUT.svg [--requests 15]

Every fleet has the same load for each replica. What changes with the number of replicas is
therefore due to the front and the routing. Nothing of it is measured: steps are those of a model of
8 billion parameters in int8 on a server of 32 processors (`COSTS`), and the front's times those of
`FrontCosts`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from infc.driver.simulate.costs import FrontCosts, StepCosts
from infc.driver.simulate.fleet import Fleet, simulate
from infc.driver.simulate.outcome import Outcome
from infc.driver.simulate.planned import saturation
from infc.driver.simulate.replica import ReplicaLimits
from infc.driver.simulate.workload import Mix, random_workload

from .chart import Panel, Point, Series, draw

COSTS = StepCosts(
    tokens=(1, 16, 64, 512),
    seconds=(0.040, 0.042, 0.055, 0.400),
    sequence=5e-5,
    decode_context=7e-7,
    prompt_context=1e-9,
)
"""8 GB of weights at 200 GB/s, 20 Tera-operations a second, and 128 KiB of KV a token."""
LIMITS = ReplicaLimits(max_running=64, step_tokens=512, num_blocks=4000, block_size=32)
MIX = Mix(prompt_tokens=600, output_tokens=200, prefix_tokens=512)
PREFIXES = 2  # for each replica
RATE = 0.6  # requests a second for each replica
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
_PER_FRONT = 16
WAYS = ("prefix", "random", f"fronts of {_PER_FRONT}", "fronts by prefix")
"""One front with either routing, or fronts that are chosen at random, or by the prompt."""


def fleet(way: str, count: int) -> Fleet:
    """So many replicas, arranged in one of the ways."""
    return Fleet(
        replicas=count,
        limits=LIMITS,
        costs=COSTS,
        fronts=max(1, count // _PER_FRONT) if way in WAYS[2:] else 1,
        fronts_by_prefix=way == WAYS[3],
        routing="random" if way == WAYS[1] else "prefix",
    )


def outcome_of(way: str, count: int, requests: int) -> Outcome:
    """What such a fleet does: at least with a thousand requests."""
    number = max(1000, requests * count)
    mix = replace(MIX, num_prefixes=PREFIXES * count)
    workload = random_workload(RATE * count, number, mix, block_size=LIMITS.block_size, seed=count)
    return simulate(fleet(way, count), workload)


def panel(title: str, label: str, found: dict[str, list[tuple[int, float]]]) -> Panel:
    """One pair of axes."""
    lines = [
        Series(way, [Point(count, value, value, value) for count, value in values])
        for way, values in found.items()
    ]
    return Panel(title, "replicas", label, lines)


def main() -> None:
    """Prints a table and writes the drawing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=15, help="for each replica")
    given = parser.parse_args()
    first: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS}
    gaps: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS}
    hits: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS}
    rates: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS}
    print("| way | replicas | tok/s | first token p50 | p99 | between p99 | hits | busy | front |")
    print("| --- |" + " --- |" * 8)
    for way in WAYS:
        for count in COUNTS:
            if way in WAYS[2:] and count < 2 * _PER_FRONT:
                continue
            begun = time.process_time()
            one = outcome_of(way, count, given.requests)
            first[way].append((count, one.first_token.p99))
            gaps[way].append((count, one.gap.p99))
            hits[way].append((count, 100 * one.hit_rate))
            rates[way].append((count, one.throughput))
            print(
                f"| {way} | {count} | {one.throughput:.0f} | {one.first_token.p50:.3f} s"
                f" | {one.first_token.p99:.3f} s | {one.gap.p99 * 1000:.0f} ms"
                f" | {one.hit_rate:.0%} | {one.busy:.0%} | {one.front_busy:.0%} |"
                f" <!-- {time.process_time() - begun:.1f} s -->",
                flush=True,
            )
    workload = random_workload(
        RATE, 2000, replace(MIX, num_prefixes=1), block_size=LIMITS.block_size, seed=1
    )
    print(saturation(LIMITS, COSTS, FrontCosts(), workload))
    panels = [
        panel("Tokens of answers", "tok/s", rates),
        panel("First token, p99", "s", first),
        panel("Between tokens, p99", "s", gaps),
        panel("Prompts found in caches", "%", hits),
    ]
    note = f"Simulated: {RATE:g} requests a second for each replica, {PREFIXES} prefixes for each"
    given.out.write_text(draw(panels, note=note))


if __name__ == "__main__":
    main()
