"""What several engine processes give and take: throughput, prefix hits, start, and memory.

    python -m benchmarks.replicas ARTIFACT [--parts throughput,prefixes,starts] [--rounds 5]
        [--streams 64] [--tokens 128] [--answers 2] [--starts 10]

`throughput`: two replicas with a thread each beside one with one thread, in turns, for answers that
are sent as a whole and as streams; CPU time a token of the front's process, and of the client. On a
machine with two processors, both compete with the engines of two replicas, and not with a single
one: `most` is the ratio that is left if engines get all the rest.
`prefixes`: tokens found in prefix caches for 16 shared prefixes: one engine, two with half of its
KV memory each, and the same two with random routing.
`starts`: seconds from the end of a replica until its successor takes requests, beside another
replica, with a spare process and without; and what a replica has of memory of its own, without its
KV cache, of which it has touched next to nothing by then.

Prints one line of JSON for each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.serving import prompts_of, serve, served
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.machine import available_cpus
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.front import Front
from infc.runtime.replicas.opening import open_front
from infc.runtime.sampling.sampling_params import SamplingParams

PREFIXES, PREFIX_TOKENS, USES = 16, 320, 8


@contextlib.contextmanager
def opened(
    artifact: Artifact, count: int, *, policy: str = "prefix", **options: Any
) -> Iterator[Front]:
    """A front whose engines are ready."""
    front = open_front(artifact, RuntimeOptions(**options), count, policy=policy)
    try:
        front.wait_until_open()
        yield front
    finally:
        front.shutdown()


def throughput(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each way to ask, of one replica and of two in turns."""
    command = f"{sys.executable} -m infc"
    with contextlib.ExitStack() as ending:
        servers = {
            count: ending.enter_context(
                serve(options.artifact, command, count, ("--threads", str(count)))
            )
            for count in (1, 2)
        }
        runs: dict[tuple[str, int], list[Any]] = {}
        for round_ in range(-1, options.rounds):  # one that does not count
            for way in ("whole", "streamed"):
                for count, server in servers.items():
                    total = options.streams * options.answers
                    prompts = prompts_of(f"{round_} {way} {count}", total)
                    stream = way == "streamed"
                    run = served(server, options.streams, prompts, options.tokens, stream=stream)
                    assert run.tokens == total * options.tokens
                    if round_ >= 0:
                        runs.setdefault((way, count), []).append(run)
    cpus = available_cpus()
    for way in ("whole", "streamed"):
        one, two = runs[way, 1], runs[way, 2]
        others = [(run.process + run.client) / run.seconds for run in two]
        yield {
            "part": f"throughput, {way}",
            "streams": options.streams,
            "one_tokens_per_s": round(statistics.median(run.rate for run in one)),
            "two_tokens_per_s": round(statistics.median(run.rate for run in two)),
            "ratio": spread([b.rate / a.rate for a, b in zip(one, two, strict=True)]),
            "most": spread([min(2.0, cpus - share) for share in others]),
            "front_us_per_token": spread([1e6 * run.process / run.tokens for run in two]),
            "client_us_per_token": spread([1e6 * run.client / run.tokens for run in two]),
        }


def prefixes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same requests in the same order for each; four are under way at a time."""
    artifact, draw = open_artifact(options.artifact), Random(0)
    shared = [[draw.randrange(10, 4000) for _ in range(PREFIX_TOKENS)] for _ in range(PREFIXES)]
    prompts = [[*prefix, 7, number] for number in range(USES) for prefix in shared]
    draw.shuffle(prompts)
    at_most = PREFIX_TOKENS * (len(prompts) - PREFIXES)
    for count, policy in ((1, "prefix"), (2, "prefix"), (2, "random")):
        memory = options.prefix_kv_mib // count
        with opened(artifact, count, policy=policy, kv_memory=f"{memory}MiB") as front:
            found = asyncio.run(_num_found(front, list(prompts)))
        yield {
            "part": "prefixes",
            "replicas": count,
            "routing": policy,
            "kv_mib_each": memory,
            "found_tokens": found,
            "of_what_could_be": round(found / at_most, 3),
        }


async def _num_found(front: Front, prompts: list[list[int]]) -> int:
    found = 0

    async def work() -> None:
        nonlocal found
        while prompts:
            async for output in front.generate(prompts.pop(), SamplingParams(max_tokens=2)):
                if output.finished:
                    found += output.metrics.num_cached_tokens

    await asyncio.gather(*(work() for _ in range(4)))
    return found


def starts(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Replicas that are killed beside one that is not."""
    artifact = open_artifact(options.artifact)
    seconds: dict[str, list[float]] = {"with_spare_s": [], "without_spare_s": []}
    with opened(artifact, 2, kv_memory="64MiB") as front:
        for _ in range(options.starts):
            while not front._spare_process.is_there:
                time.sleep(0.01)
            seconds["with_spare_s"].append(_seconds_to_start(front))
            seconds["without_spare_s"].append(_seconds_to_start(front))
        at_first = [private_mib(each.pid) for each in front.replicas()]
        asyncio.run(_answer_some(front))
        later = [private_mib(each.pid) for each in front.replicas()]
    yield {
        "part": "starts",
        **{name: spread(values) for name, values in seconds.items()},
        "private_mib": spread(at_first),
        "private_mib_after_a_request": spread(later),
        "weights_mib": round(artifact.weights_path.stat().st_size / 2**20, 1),
    }


def _seconds_to_start(front: Front) -> float:
    """From the end of the first replica until its successor is ready."""
    before = front.replicas()[0]
    assert before.pid is not None
    begun = time.perf_counter()
    os.kill(before.pid, signal.SIGKILL)
    while True:
        now = front.replicas()[0]
        if now.state == "ready" and now.num_restarts > before.num_restarts:
            return time.perf_counter() - begun
        time.sleep(0.001)


async def _answer_some(front: Front) -> None:
    async def answer(token: int) -> None:
        async for _ in front.generate([5, token, 7], SamplingParams(max_tokens=16)):
            pass

    await asyncio.gather(*(answer(token) for token in range(10, 14)))


def private_mib(pid: int | None) -> float:
    """What a process does not share with others."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(found[1]) for found in re.finditer(r"Private_\w+: +(\d+) kB", text)) / 1024


def spread(values: list[float]) -> list[float]:
    """Median, least and greatest."""
    return [round(f(values), 3) for f in (statistics.median, min, max)]


PARTS = {"throughput": throughput, "prefixes": prefixes, "starts": starts}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--answers", type=int, default=2, help="that each stream asks for")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--prefix-kv-mib", type=int, default=22, help="of the one engine")
    options = parser.parse_args()
    for part in options.parts.split(","):
        for result in PARTS[part](options):
            print(json.dumps({**result, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
