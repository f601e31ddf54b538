"""Decoding while other programs take processors, of infc and of peers, in turns.

    python -m benchmarks.peers.busy WORKDIR [--contestants infc-int4,llama.cpp-q4_0] [--rounds 5]

After `benchmarks.peers.setup` and a run of `benchmarks.peers.run`, which compiles what infc takes
part with. The other programs are endless loops, one, two ... as many as there are threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .client import Worker
from .contestants import CONTESTANTS, DEFAULT_SHAPES, SHAPES, Workdir
from .start import Starter
from .summary import spread
from .workloads import WAKE_UP, WORKLOADS


def main() -> None:
    """Load all, let each decode beside so many loops in turn, print tokens a second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--contestants", default="infc-int4,llama.cpp-q4_0,openvino-int4")
    parser.add_argument("--shape", choices=SHAPES, default=DEFAULT_SHAPES[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    names = options.contestants.split(",")
    if unknown := sorted(set(names) - {c.name for c in CONTESTANTS}):
        parser.error(f"no contestant {unknown[0]!r}")
    starter = Starter(
        workdir=Workdir(options.workdir.resolve()),
        shape=options.shape,
        threads=options.threads,
        patience=300.0,
    )
    loops = range(options.threads + 1)
    rates: dict[tuple[str, int], list[float]] = {(n, i): [] for n in names for i in loops}
    with ExitStack() as stack:
        workers = {}
        for contestant in (c for c in CONTESTANTS if c.name in names):
            workers[contestant.name] = stack.enter_context(starter.worker(contestant))
            workers[contestant.name].loaded()
            workers[contestant.name].pause()
        for round_ in range(options.rounds):
            for count in loops:
                for name, worker in workers.items():
                    with busy(count):
                        rate = decode(worker, round_)
                    rates[name, count].append(rate)
                    line = f"round {round_}, beside {count}: {name} {rate:.1f} tokens/s"
                    print(line, file=sys.stderr, flush=True)
    print("| tokens/s beside endless loops |", " | ".join(map(str, loops)), "|")
    print("| --- |" + " --- |" * len(loops))
    for name in workers:
        cells = [spread(rates[name, count]) for count in loops]
        print(
            f"| {name} |",
            " | ".join(f"{c.median:.1f} ({c.low:.1f}–{c.high:.1f})" for c in cells if c),
            "|",
        )


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many endless loops beside."""
    loops: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            loops.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        time.sleep(0.3)  # they have started
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def decode(worker: Worker, round_: int) -> float:
    """Tokens a second of one answer, its first token left out."""
    worker.resume()
    try:
        worker.ask(WAKE_UP)
        reply = worker.ask(WORKLOADS["a"].draw(round_))
    finally:
        worker.pause()
    return (reply.tokens - 1) / (reply.seconds - reply.first)


if __name__ == "__main__":
    main()
