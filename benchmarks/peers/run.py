"""Measures infc beside its peers, turn by turn, and prints the tables.

    python -m benchmarks.peers.run WORKDIR [--shapes 0.5b,1b] [--workloads abcd]
        [--contestants infc-int8,llama.cpp-q8_0,...] [--rounds 5] [--batch-rounds 2]

From the repository's root, in infc's own environment, after `benchmarks.peers.setup`. Who is not
installed is left out, and named with the reason. All samples are in WORKDIR/results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..models import make_checkpoint
from .client import REPOSITORY
from .contestants import CONTESTANTS, DEFAULT_SHAPES, SHAPES, Contestant, Workdir
from .machine import Ceilings, describe
from .measure import Plan, Turns
from .report import render
from .results import Entrant, Results, ShapeRun, read_facts
from .start import Starter
from .summary import PREFILL_TOKENS
from .workloads import choose


class _Absent(Exception):
    """A contestant cannot take part; the message is the reason."""


def main() -> None:
    """Parse, measure each shape, print."""
    parser = _parser()
    options = parser.parse_args()
    workdir = Workdir(options.workdir.resolve())
    workdir.logs().mkdir(parents=True, exist_ok=True)
    shapes, wanted = options.shapes.split(","), options.contestants.split(",")
    if unknown := set(wanted) - {c.name for c in CONTESTANTS} | set(shapes) - set(SHAPES):
        parser.error(f"no contestant or shape {min(unknown)!r}")
    try:
        workloads = choose(options.workloads)
    except ValueError as error:
        parser.error(str(error))
    plan = Plan(
        workloads=workloads,
        rounds=options.rounds,
        batch_rounds=options.batch_rounds,
        starts=options.starts,
    )
    contestants = [c for c in CONTESTANTS if c.name in wanted]
    results = Results(describe(options.threads))
    place = workdir.root / "results" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    ceilings = Ceilings(options.threads)
    for shape in shapes:
        run = ShapeRun(
            shape, read_facts(make_checkpoint(shape, workdir.checkpoints), PREFILL_TOKENS)
        )
        results.shapes.append(run)
        present = _entrants(workdir, run, contestants)
        starter = Starter(
            workdir=workdir, shape=shape, threads=options.threads, patience=options.patience
        )
        Turns(plan, run, starter, ceilings, lambda: results.write(place)).measure(present)
    results.write(place)
    print(render(results))
    print(f"every sample: {place}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--shapes", default=",".join(DEFAULT_SHAPES))
    parser.add_argument("--workloads", default="abcd", help="letters, or keys such as a,b,c32")
    parser.add_argument("--contestants", default=",".join(c.name for c in CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-rounds", type=int, default=2, help="rounds that do c and d too")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds that an answer may take"
    )
    parser.add_argument(
        "--starts", action=argparse.BooleanOptionalAction, default=True, help="time fresh processes"
    )
    return parser


def _entrants(
    workdir: Workdir, run: ShapeRun, contestants: Sequence[Contestant]
) -> list[Contestant]:
    """Those that can take part, entered into the run; the others with their reasons."""
    present = []
    for contestant in contestants:
        try:
            run.entrants[contestant.name] = _enter(workdir, contestant, run.shape)
            present.append(contestant)
        except _Absent as reason:
            run.absent[contestant.name] = str(reason)
            print(f"{run.shape} {contestant.name} is left out: {reason}", file=sys.stderr)
    return present


def _enter(workdir: Workdir, contestant: Contestant, shape: str) -> Entrant:
    if reason := workdir.missing(contestant, shape):
        raise _Absent(reason)
    model = workdir.model(contestant, shape)
    if contestant.is_infc:
        recipe = workdir.checkpoint(shape) / "model.yaml"
        scheme = f"quantization={contestant.scheme}"
        infc = (sys.executable, "-m", "infc", "compile", "--quiet")
        sets = (f"--set={setting}" for setting in (scheme, *contestant.settings))
        _output(*infc, str(recipe), "-o", str(model), *sets)
    engine = contestant.peer.engine
    python = str(workdir.python(contestant.peer))
    weighed = _output(python, "-m", "benchmarks.peers.weigh", engine, str(model))
    return Entrant(contestant.bits, contestant.is_infc, "", int(weighed.split()[-1]))


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise _Absent(lines[-1] if lines else f"{command[2]} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
