"""What `infc plan` predicts for one and two replicas, beside what `infc serve` does.

    python benchmarks/replica_plan.py ARTIFACT [--replicas 1,2] [--rates 10,30,200] [--requests 300]

Steps are measured with one thread, in CPU time. Then a server with so many replicas, of one thread
each, is asked the very requests that are simulated, each at its time and over a connection of its
own.
Server and client take processors from the replicas, which the simulation gives one each: on a
machine with few of them, or with other work, it predicts too much. Tokens for each second of CPU
time that replicas took depend less on that, and are compared as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infc.driver.simulate.fleet import Fleet, simulate
from infc.driver.simulate.outcome import Times
from infc.driver.simulate.planned import PlannedReplica, plan_replica
from infc.driver.simulate.workload import Asked, Mix, Workload, random_workload
from infc.ir.artifact import open_artifact
from infc.ir.machine import available_cpus, cpu_model
from infc.runtime.options import RuntimeOptions

_KV_MEMORY = "64MiB"
_MOST_SECONDS = 120.0
_MIX = Mix(prompt_tokens=200, output_tokens=48, num_prefixes=16, prefix_tokens=128)


@dataclass(frozen=True, slots=True)
class Seen:
    """When a request had its first token and its last, in seconds since it was to be sent."""

    first: float
    last: float
    tokens: int
    ended_at: float


def prompt_of(asked: Asked, number: int, block_size: int, vocab_size: int) -> list[int]:
    """Tokens whose blocks are equal where the digests are."""
    tokens: list[int] = []
    for digest in asked.digests:
        draw = random.Random(digest)
        tokens += [draw.randrange(3, vocab_size) for _ in range(block_size)]
    draw = random.Random(number)
    return tokens + [
        draw.randrange(3, vocab_size) for _ in range(asked.prompt_tokens - len(tokens))
    ]


def cpu_seconds(pid: int) -> float:
    """Of the processes that a process has started."""
    ticks = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            ticks += sum(map(int, Path(f"/proc/{child}/stat").read_text().split()[13:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(artifact: Path, replicas: int) -> Iterator[tuple[int, int]]:
    """A server in a process of its own; its port and its number."""
    command = [sys.executable, "-m", "infc", "serve", str(artifact), "--port", "0"]
    command += ["--replicas", str(replicas), "--threads", str(replicas), "--kv-memory", _KV_MEMORY]
    process = subprocess.Popen([*command, "--model-name", "m"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rpartition(":")[2].partition("/")[0]), process.pid
    finally:
        process.terminate()
        process.wait()


async def ask(port: int, body: bytes, at: float) -> Seen:
    """One request at its time."""
    await asyncio.sleep(max(0.0, at - time.perf_counter()))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    writer.write(
        f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body
    )
    first, tokens = 0.0, 0
    while line := await reader.readline():
        if line.startswith(b'data: {"'):
            first = first or time.perf_counter()
            tokens += 1
    writer.close()
    now = time.perf_counter()
    return Seen(first - at, now - at, tokens, now)


async def ask_all(port: int, workload: Workload, vocab_size: int) -> tuple[list[Seen], float]:
    """All requests, and the seconds from the first one to the last token."""
    bodies = [
        json.dumps(
            {
                "model": "m",
                "prompt": prompt_of(asked, number, workload.block_size, vocab_size),
                "max_tokens": asked.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        for number, asked in enumerate(workload.asked)
    ]
    start = time.perf_counter() + 0.2
    async with asyncio.timeout(_MOST_SECONDS):
        seen = await asyncio.gather(
            *(
                ask(port, body, start + asked.at)
                for body, asked in zip(bodies, workload.asked, strict=True)
            )
        )
    return list(seen), max(each.ended_at for each in seen) - start - workload.asked[0].at


def compare(
    artifact: Path, planned: PlannedReplica, replicas: int, rate: float, count: int, vocab: int
) -> str:
    """A line: predicted and measured."""
    size = planned.limits.block_size
    workload = random_workload(rate, count, _MIX, block_size=size, seed=5)
    fleet = Fleet(replicas=replicas, limits=planned.limits, costs=planned.costs)
    outcome = simulate(fleet, workload)
    with serving(artifact, replicas) as (port, pid):
        warm = random_workload(20, 8, _MIX, block_size=size, seed=6)
        asyncio.run(ask_all(port, warm, vocab))
        before = cpu_seconds(pid)
        seen, seconds = asyncio.run(ask_all(port, workload, vocab))
        taken = cpu_seconds(pid) - before
    expected = sum(each.output_tokens for each in workload.asked)
    measured = Times.of([(each.first, 1) for each in seen])
    rows = [f"{replicas}", f"{rate:g}", f"{outcome.throughput:.0f}", f"{expected / seconds:.0f}"]
    for mine, its in (
        (outcome.first_token.p50, measured.p50),
        (outcome.first_token.p90, measured.p90),
    ):
        rows += [f"{mine * 1000:.3g} ms", f"{its * 1000:.3g} ms"]
    rows += [f"{expected / outcome.busy_seconds:.0f}", f"{expected / taken:.0f}"]
    return f"| {' | '.join(rows)} | {outcome.busy:.0%} |"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--replicas", default="1,2")
    parser.add_argument("--rates", default="10,30,200")
    parser.add_argument("--requests", type=int, default=300)
    given = parser.parse_args()
    artifact = open_artifact(given.artifact, "stamp")
    options = RuntimeOptions(threads=1, kv_memory=_KV_MEMORY)
    planned = plan_replica(artifact, options, measure=True, clock=time.process_time)
    print(f"{cpu_model()}, {available_cpus()} processors; {given.requests} requests each, {_MIX}")
    print(planned.costs)
    head = ["replicas", "req/s", "tok/s predicted", "measured"]
    head += ["first token p50 predicted", "measured", "p90 predicted", "measured"]
    head += ["tok per CPU second predicted", "measured", "busy predicted"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for replicas in map(int, given.replicas.split(",")):
        for rate in map(float, given.rates.split(",")):
            vocab = artifact.manifest.model.vocab_size
            line = compare(given.artifact, planned, replicas, rate, given.requests, vocab)
            print(line, flush=True)


if __name__ == "__main__":
    main()
