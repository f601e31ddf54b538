"""Two checkouts of infc beside each other: rates, start and memory of the same model, in turns.

    python benchmarks/checkouts.py OLD NEW MODEL [--set quantization=int8] [--pairs 24]
        [--workloads decode,prefill,batch-8,batch-32] [--starts 15]

OLD and NEW are checkouts after `make setup`; MODEL is a checkpoint or a recipe, which each compiles
for itself. Both engines stay open, and a workload runs for some tenths of a second in one and then
in the other: this machine's speed changes within minutes, so only such pairs can show a difference
of a few percent. Starts are whole processes, in turns too. Printed are ratios of NEW to OLD.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from infc.ir.machine import cpu_model

WORKLOADS: Final = {
    "decode": (96, 1, 16),
    "prefill": (1, 1, 512),
    "batch-8": (32, 8, 16),
    "batch-32": (24, 32, 32),
    "batch-64": (24, 64, 16),
}
"""Tokens that each of so many sequences generates after a prompt of so many."""

ENGINE: Final = """
import infc, json, sys, time
llm = infc.LLM(sys.argv[1], kv_memory="600MiB")
print("ready", flush=True)
for run, line in enumerate(sys.stdin):
    tokens, sequences, prompt = json.loads(line)
    params = infc.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    # Other prompts in each run: nothing of them is in the prefix cache.
    prompts = [[(run * 31 + i * 7 + j * 3) % 1000 + 5 for j in range(prompt)]
               for i in range(sequences)]
    wall, cpu = time.perf_counter(), time.process_time()
    llm.generate(prompts, params)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""

START: Final = """
import time
begun = time.perf_counter()
import infc, json, sys
llm = infc.LLM(sys.argv[1], kv_memory="300MiB")
opened = time.perf_counter() - begun
llm.generate([[1, 2, 3]], infc.SamplingParams(max_tokens=1, temperature=0))
first = time.perf_counter() - begun
llm.generate([[1, 2, 3]], infc.SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
sizes = [int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]
print(json.dumps([opened, first, *sizes]))
"""
STARTS: Final = ("open, s", "first token, s", "RSS, MB", "peak, MB")


class Engine:
    """An open engine of one checkout."""

    def __init__(self, checkout: Path, artifact: Path) -> None:
        command: list[Any] = [checkout / ".venv/bin/python", "-c", ENGINE, artifact]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=artifact.parent
        )
        while self._answer() != "ready":
            pass

    def run(self, workload: tuple[int, int, int]) -> tuple[float, float]:
        """Seconds and CPU seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(workload) + "\n")
        self._process.stdin.flush()
        wall, cpu = json.loads(self._answer())
        return float(wall), float(cpu)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine ended: see above")
        return line.strip()


def main() -> None:
    """Compile with both, and print what they take."""
    options = parse()
    checkouts = [options.old.resolve(), options.new.resolve()]
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        artifacts = [Path(folder) / f"{name}.infc" for name in ("old", "new")]
        for checkout, artifact in zip(checkouts, artifacts, strict=True):
            command = [checkout / ".venv/bin/infc", "compile", options.model, "-o", artifact]
            settings = [word for one in options.set for word in ("--set", one)]
            subprocess.run([*command, *settings], check=True, capture_output=True, cwd=checkout)
        print(f"{cpu_model()}: {options.model}; new by old, {options.pairs} pairs")
        print("| | rate | quartiles | rate by CPU time | best of each | old, ms |")
        print("| --- " * 6 + "|")
        engines = [Engine(c, a) for c, a in zip(checkouts, artifacts, strict=True)]
        for name in options.workloads.split(","):
            measure(name, engines, options.pairs)
        for engine in engines:
            engine.close()
        if options.starts:
            print(f"\n| {options.starts} starts | old | new | new by old |\n" + "| --- " * 4 + "|")
            measure_starts(checkouts, artifacts, options.starts)


def measure(name: str, engines: Sequence[Engine], pairs: int) -> None:
    """Print the ratios of one workload. The first pair only warms up."""
    runs = []
    for pair in range(pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        found = {which: engines[which].run(WORKLOADS[name]) for which in order}
        runs.append((found[0], found[1]))
    runs = runs[1:]
    rates = sorted(old[0] / new[0] for old, new in runs)
    cpu = statistics.median(old[1] / new[1] for old, new in runs)
    old, new = (min(one[which][0] for one in runs) for which in (0, 1))
    quartiles = f"{rates[len(rates) // 4]:.3f}–{rates[3 * len(rates) // 4]:.3f}"
    print(
        f"| {name} | {statistics.median(rates):.3f} | {quartiles} | {cpu:.3f} | {old / new:.3f}"
        f" | {old * 1e3:.1f} |",
        flush=True,
    )


def measure_starts(checkouts: Sequence[Path], artifacts: Sequence[Path], count: int) -> None:
    """Print what starting takes. The first pair only warms up."""
    values: list[list[list[float]]] = [[], []]
    for pair in range(count + 1):
        for which in (0, 1) if pair % 2 else (1, 0):
            command: list[Any] = [checkouts[which] / ".venv/bin/python", "-c", START]
            done = subprocess.run(
                [*command, artifacts[which]],
                check=True,
                capture_output=True,
                text=True,
                cwd=artifacts[which].parent,
            )
            values[which].append(json.loads(done.stdout))
    for place, name in enumerate(STARTS):
        old, new = ([run[place] for run in runs[1:]] for runs in values)
        ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
        middle = [statistics.median(side) for side in (old, new)]
        print(f"| {name} | {middle[0]:.3f} | {middle[1]:.3f} | {ratio:.3f} |", flush=True)


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--starts", type=int, default=15)
    parser.add_argument("--workloads", default="decode,prefill,batch-8,batch-32")
    parser.add_argument("--workdir", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
