"""Tokens a second against batch and context, and with a long context, beside the roofline.

    python benchmarks/scaling.py WORKDIR [--shape 0.5b] [--schemes none,int8,int4] [--rounds 5]
        [--svg docs/assets/scaling.svg] [--long]

Decode steps of 1 to 64 sequences, each with the same context stored, run on the executor alone:
what Python takes of a step is left out (`infc bench` has it). Rounds go through all points of all
schemes, and begin with the machine's ceilings, so that what is compared was measured in turn; the
roofline takes the best ceilings of the run. `--long` adds decode at 16k tokens of context, and a
prefill of 8k tokens in chunks of a step. All is printed as a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chart import Panel, Point, Series, draw
from models import make_checkpoint

import infc
from infc.codegen.cpp.ceilings import KINDS, build_probe
from infc.driver.bare_executor import open_bare
from infc.driver.bench.peak_memory import peak_rss_bytes
from infc.driver.bench.results import Spread
from infc.driver.bench.trial_steps import TrialStep, fill_blocks
from infc.driver.explain.collect import read_program
from infc.driver.progress import Reporter, make_reporter
from infc.ir.artifact import Artifact
from infc.ir.machine import available_cpus, available_memory, cpu_model
from infc.ir.roofline import Ceilings, Roofline
from infc.ir.targets import resolve_target
from infc.runtime.executors.base import Executor, run_step, work_ahead
from infc.runtime.scheduling.kv_groups import planned_bytes

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 1024, 4096)
LONG_DECODE, LONG_PREFILL = 16 << 10, 8 << 10
MAX_CONTEXT = 16 << 10
SECONDS_A_POINT = 0.3
READ_BYTES = 512 << 20


@dataclass(slots=True)
class Place:
    """One thing that is measured: its steps, run one after another, and what they took."""

    scheme: str
    name: str
    batch: int
    context: int
    steps: tuple[TrialStep, ...]
    new_tokens: int
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Build, measure in turns, print, draw."""
    options = parse()
    schemes = options.schemes.split(",")
    artifacts = {one: compile_long(options.workdir, options.shape, one) for one in schemes}
    probe = build_probe(resolve_target("native"))
    places = [
        place
        for scheme, artifact in artifacts.items()
        for place in (
            *grid(scheme, options),
            *(long_ones(scheme, artifact) if options.long else ()),
        )
        if fits(artifact, place)
    ]
    ceilings, reporter = [], make_reporter(quiet=False)
    try:
        for round_ in range(options.rounds):
            rates = {kind: probe.product_rate(kind, options.threads) for kind in KINDS}
            read = probe.read_rate(options.threads, READ_BYTES)
            ceilings.append(Ceilings(threads=options.threads, read=read, **rates))
            for scheme, artifact in artifacts.items():
                ours = [place for place in places if place.scheme == scheme]
                with reporter.stage(f"round {round_ + 1}, {scheme}"):
                    measure(artifact, ours, options.threads, reporter)
            print(f"round {round_ + 1} of {options.rounds}: {ceilings[-1].describe()}", flush=True)
    except KeyboardInterrupt:
        places = [place for place in places if place.seconds]
        if not places:
            sys.exit("interrupted before anything was measured")
        print("interrupted: what was measured until then", flush=True)
    best = at_best(ceilings)
    rooflines = {one: Roofline(read_program(artifact), best) for one, artifact in artifacts.items()}
    report(places, rooflines, best, options)
    if options.svg is not None:
        drawn = draw(panels(places, rooflines), note=f"{cpu_model()}, {best.describe()}")
        options.svg.write_text(drawn, encoding="utf-8")
        print(options.svg)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--shape", choices=["0.5b", "1b"], default="0.5b")
    parser.add_argument("--schemes", default="none,int8,int4", help="of `quantization`, by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--batches", type=numbers, default=BATCHES, metavar="1,2,4")
    parser.add_argument("--contexts", type=numbers, default=CONTEXTS, metavar="128,1024")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--long", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def compile_long(workdir: Path, shape: str, scheme: str) -> Artifact:
    """The artifact of a shape whose positions reach far enough: its weights are random anyhow."""
    source = make_checkpoint(shape, workdir)
    place = workdir / f"{source.name}-long"
    if not (place / "config.json").exists():
        shutil.copytree(source, place, copy_function=shutil.copy2, dirs_exist_ok=True)
        config = json.loads((place / "config.json").read_text())
        config["max_position_embeddings"] = MAX_CONTEXT
        (place / "config.json").write_text(json.dumps(config, indent=1))
    overrides: dict[str, object] = {
        "quantization": scheme,
        "runtime.max_context": MAX_CONTEXT,
        "runtime.max_sequences": max(BATCHES),
    }
    output = place.with_name(f"{place.name}-{scheme}.artifact")
    return infc.compile(place / "model.yaml", output=output, overrides=overrides, verify=False)


def grid(scheme: str, options: argparse.Namespace) -> Iterator[Place]:
    """Decode steps of every batch at every context."""
    for context in options.contexts:
        for batch in options.batches:
            yield Place(scheme, "decode", batch, context, (TrialStep(batch, 1, context),), batch)


def long_ones(scheme: str, artifact: Artifact) -> Iterator[Place]:
    """Decode far into a context, and a long prompt in chunks of a step."""
    yield Place(scheme, "decode", 1, LONG_DECODE, (TrialStep(1, 1, LONG_DECODE),), 1)
    size = artifact.manifest.main.limits.step_tokens
    ends = [min(start + size, LONG_PREFILL) for start in range(0, LONG_PREFILL, size)]
    chunks = tuple(
        TrialStep(1, end - start, end) for start, end in zip([0, *ends], ends, strict=False)
    )
    yield Place(scheme, "prefill", 1, LONG_PREFILL, chunks, LONG_PREFILL)


def blocks_of(artifact: Artifact, places: Sequence[Place]) -> tuple[int, ...]:
    """Blocks a KV group that hold the largest of these steps."""
    each = [step.num_blocks(artifact.manifest) for place in places for step in place.steps]
    return tuple(max(counts) for counts in zip(*each, strict=True))


def fits(artifact: Artifact, place: Place) -> bool:
    """Whether there is memory for its KV cache; says so where there is not."""
    needed = planned_bytes(artifact.manifest.main.resources, blocks_of(artifact, [place]))
    if needed < available_memory() // 2:
        return True
    print(f"left out: {place.batch} × {place.context} tokens take {needed / 2**30:.1f} GiB of KV")
    return False


def measure(artifact: Artifact, places: Sequence[Place], threads: int, reporter: Reporter) -> None:
    """One round of some places on an executor of their own."""
    num_blocks = blocks_of(artifact, places)
    with open_bare(artifact, num_blocks, num_threads=threads) as executor:
        work_ahead(executor)
        fill_blocks(executor, artifact.manifest, num_blocks)
        for done, place in enumerate(places):
            reporter.advance(done, len(places), f"{place.name} {place.batch} × {place.context}")
            place.seconds.append(fastest(artifact, executor, place))


def fastest(artifact: Artifact, executor: Executor, place: Place) -> float:
    """Seconds of the fastest run of a place's steps in some tenths of a second, once at least."""
    steps = [step.build(artifact.manifest) for step in place.steps]
    run_step(executor, steps[0])  # the arena is touched for the first time
    best, until = float("inf"), time.perf_counter() + SECONDS_A_POINT
    while best == float("inf") or time.perf_counter() < until:
        begun = time.perf_counter()
        for step in steps:
            run_step(executor, step)
        best = min(best, time.perf_counter() - begun)
    return best


def at_best(ceilings: Sequence[Ceilings]) -> Ceilings:
    """The best of each rate."""
    names = ("read", *KINDS)
    rates = {name: max(getattr(one, name) for one in ceilings) for name in names}
    return Ceilings(threads=ceilings[0].threads, **rates)


def needed_seconds(place: Place, roofline: Roofline) -> float:
    """The roofline of a place's steps together."""
    return sum(roofline.step_seconds(step.shape) for step in place.steps)


def report(
    places: Sequence[Place],
    rooflines: dict[str, Roofline],
    best: Ceilings,
    options: argparse.Namespace,
) -> None:
    """Print a line a place, and everything as JSON."""
    rows = []
    for place in places:
        rate = Spread.of([place.new_tokens / seconds for seconds in place.seconds])
        roof = place.new_tokens / needed_seconds(place, rooflines[place.scheme])
        rows.append(
            {
                "scheme": place.scheme,
                "what": place.name,
                "batch": place.batch,
                "context": place.context,
                "tokens_per_second": asdict(rate),
                "roofline": roof,
                "share": rate.median / roof,
            }
        )
        print(
            f"{place.scheme:5} {place.name:8} {place.batch:3} × {place.context:6} tokens:"
            f" {rate.median:8.1f} ({rate.min:.1f}–{rate.max:.1f}) tokens/s,"
            f" {rate.median / roof:4.0%} of the roofline ({roof:.1f})"
        )
    facts = {"shape": options.shape, "cpu": cpu_model(), "ceilings": asdict(best)}
    facts |= {"peak_rss_bytes": peak_rss_bytes(), "places": rows}
    print("RESULT " + json.dumps(facts))


def panels(places: Sequence[Place], rooflines: dict[str, Roofline]) -> list[Panel]:
    """For each scheme one panel over batches and one over contexts."""
    result = []
    for scheme, roofline in rooflines.items():
        ours = [place for place in places if (place.scheme, place.name) == (scheme, "decode")]
        name = "bfloat16" if scheme == "none" else scheme
        contexts = list(dict.fromkeys(place.context for place in ours))
        batches = list(dict.fromkeys(place.batch for place in ours))[::3]
        by_context = [
            series(f"context {one}", [p for p in ours if p.context == one], "batch", roofline)
            for one in contexts
        ]
        by_batch = [
            series(f"batch {one}", [p for p in ours if p.batch == one], "context", roofline)
            for one in batches
        ]
        result.append(Panel(f"{name}: decode against batch", "sequences", "tokens/s", by_context))
        result.append(Panel(f"{name}: decode against context", "tokens", "tokens/s", by_batch))
    return result


def series(name: str, places: Sequence[Place], axis: str, roofline: Roofline) -> Series:
    """A line over places, by their batch or context."""
    points = []
    for place in places:
        rate = Spread.of([place.new_tokens / seconds for seconds in place.seconds])
        roof = place.new_tokens / needed_seconds(place, roofline)
        points.append(Point(getattr(place, axis), rate.median, rate.min, rate.max, roof))
    return Series(name, points)


if __name__ == "__main__":
    main()
