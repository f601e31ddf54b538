"""What compiling takes: seconds, processor seconds and memory, alone and with one core taken.

    python benchmarks/compile_times.py WORKDIR [--cases 135m,0.5b,0.5b:int4,1b:int4] [--rounds 3]
        [--cpus 2] [--known-kernels] [--checkpoint NAME=DIR ...]

Compiles as a user would for the first time: verified, with an empty cache, in a fresh process that
may use `--cpus` processors. With `--known-kernels`, all runs share one cache, in which the kernels
of each model but the first time are known. `busy` is the same while another program spins on one of
the processors. The
shapes are those of `models.py`, with random weights; `--checkpoint smollm2=DIR` measures a
checkpoint that is there (`smollm2`, `smollm2:int8`). Rounds go through all cases in turn. Printed
are medians, and one line of JSON with every run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from models import SHAPES, make_checkpoint
from startup import tree_rss_bytes

from infc.ir.machine import cpu_model

CASES = "135m,0.5b,0.5b:int4,1b:int4"


@dataclass(frozen=True, slots=True)
class Run:
    """One compilation; the peak is of the whole process tree, files that it maps included."""

    case: str
    busy: bool
    wall_s: float
    cpu_s: float
    peak_gb: float


def main() -> None:
    """Measure all cases in turn, and print."""
    options = parse()
    own = dict(one.split("=", 1) for one in options.checkpoint)
    cases = options.cases.split(",")
    places = {}
    for case in cases:
        shape = case.partition(":")[0]
        place = Path(own[shape]) if shape in own else make_checkpoint(shape, options.workdir)
        places[case] = place
    cpus = sorted(os.sched_getaffinity(0))[: options.cpus]
    runs = []
    kept = options.workdir / "known-kernels" if options.known_kernels else None
    for _ in range(options.rounds):
        for case in cases:
            for busy in (False, True):
                with one_core_taken(cpus) if busy else untouched():
                    run = compile_once(case, places[case], busy, options.workdir, cpus, kept)
                runs.append(run)
                print(f"{case} {'busy' if busy else 'alone'}: {run}", file=sys.stderr, flush=True)
    print_table(cases, runs, len(cpus))
    print("RESULT " + json.dumps({"cpu": cpu_model(), "runs": [asdict(run) for run in runs]}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--cases", default=CASES, help=f"SHAPE[:SCHEME] of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--known-kernels", action="store_true")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR")
    return parser.parse_args()


def compile_once(
    case: str, checkpoint: Path, busy: bool, workdir: Path, cpus: list[int], kept: Path | None
) -> Run:
    """One compilation in a process of its own; what it made is removed.

    `kept` is the directory of its cache, which has a new one by default.
    """
    scheme = case.partition(":")[2] or "none"
    output = workdir / "compile-times.artifact"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "infc", "compile", str(checkpoint), "-o", str(output)]
    command += ["--no-cache", "-q"]
    if scheme != "none":
        command += ["--set", f"quantization={{scheme: {scheme}, method: nearest}}"]
    cache = kept or Path(tempfile.mkdtemp(prefix="cache-", dir=workdir))
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    peak = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, tree_rss_bytes(process.pid))
        time.sleep(0.2)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    shutil.rmtree(output)
    if cache != kept:
        shutil.rmtree(cache)
    return Run(case, busy, wall, usage.ru_utime + usage.ru_stime, peak / 1e9)


@contextmanager
def untouched() -> Iterator[None]:
    """Nothing else of ours runs."""
    yield


@contextmanager
def one_core_taken(cpus: list[int]) -> Iterator[None]:
    """Another program computes on the first of the processors."""
    spin = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(spin, preexec_fn=lambda: os.sched_setaffinity(0, cpus[:1]))
    try:
        yield
    finally:
        process.kill()
        process.wait()


def print_table(cases: list[str], runs: list[Run], cpus: int) -> None:
    """Medians as Markdown."""
    print(f"\n{cpu_model()}, {cpus} processors\n")
    print("| case | alone | with one core taken | CPU seconds, alone | taken | peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases:
        alone, busy = ([r for r in runs if r.case == case and r.busy is b] for b in (False, True))
        walls = [statistics.median(run.wall_s for run in some) for some in (alone, busy)]
        cpu = [statistics.median(run.cpu_s for run in some) for some in (alone, busy)]
        peak = max(run.peak_gb for run in alone)
        cells = [f"{walls[0]:.1f} s", f"{walls[1]:.1f} s", f"{cpu[0]:.1f}", f"{cpu[1]:.1f}"]
        print(f"| {case} | {' | '.join(cells)} | {peak:.1f} GB |")


if __name__ == "__main__":
    main()
