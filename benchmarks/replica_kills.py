"""Engines of a front killed at random moments under streams of random parameters.

    python benchmarks/replica_kills.py ARTIFACT [--replicas 1 2] [--kills 200] [--streams 64]

Every transcript must equal the undisturbed one, which one engine in this process gives afterwards.
Prints the pauses that streams of killed engines saw: from the kill to their next output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from infc.ir.artifact import Artifact, open_artifact
from infc.runtime.engine import Engine
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.front import Front
from infc.runtime.replicas.opening import open_front
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

KV_MEMORY = "128MiB"
WORDS = ("def", "return", "self", "class", "import", "value", "index", "for", "in", "if", "else")


@dataclass(frozen=True, slots=True)
class Job:
    """A request of random parameters."""

    prompt: str
    params: SamplingParams
    is_whole: bool


def random_job(random: Random) -> Job:
    """Each parameter is often left as it is."""
    some = random.choice

    def maybe(chance: float, value: Any, otherwise: Any = None) -> Any:
        return value if random.random() < chance else otherwise

    prompt = " ".join(some(WORDS) for _ in range(some([3, 10, 40, 80])))
    params = SamplingParams(
        temperature=some([0.0, 0.7, 1.0, 1.3]),
        top_k=some([0, 0, 5, 50]),
        top_p=some([1.0, 1.0, 0.9]),
        min_p=some([0.0, 0.0, 0.02]),
        repetition_penalty=some([1.0, 1.0, 1.2]),
        presence_penalty=some([0.0, 0.0, 0.6]),
        frequency_penalty=some([0.0, 0.0, 0.3, -0.2]),
        logit_bias=maybe(0.2, {17: 3.0, 300: -2.0}, {}),
        banned_token_ids=maybe(0.2, [9, 10], []),
        seed=maybe(0.6, random.randrange(2**63)),
        max_tokens=some([5, 40, 120, 240]),
        min_tokens=some([0, 0, 4]),
        stop=maybe(0.4, some([["self"], ["\n\n", "return x"], ["never to be seen"]]), []),
        ignore_eos=maybe(0.7, True, False),
        logprobs=maybe(0.3, some([0, 2])),
        prompt_logprobs=maybe(0.1, 1),
        n=some([1, 1, 1, 2, 3]),
    )
    return Job(prompt, params, random.random() < 0.15)


@dataclass(slots=True)
class Run:
    """What was told of each request, and how long streams of killed engines waited."""

    told: list[tuple[Job, RequestOutput]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    num_kills: int = 0
    last: dict[str, float] = field(default_factory=dict)
    hit: dict[str, float] = field(default_factory=dict)
    """When the engine of a request was killed of which nothing has come since."""


async def _read(front: Front, name: str, job: Job, run: Run) -> None:
    reader = await front.read([job.prompt], job.params, [name], whole=job.is_whole)
    parts = []
    try:
        while reader.num_open:
            _, output = await reader.get()
            parts.append(output)
            now = time.monotonic()
            if (killed := run.hit.pop(name, None)) is not None:
                run.pauses.append(now - killed)
            run.last[name] = now
    finally:
        reader.close()
        run.last.pop(name, None)
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    run.told.append((job, merge_outputs(parts)))


async def disturb(
    front: Front,
    *,
    kills: int,
    streams: int,
    seed: int,
    seconds: tuple[float, float],
    only_streaming: bool = False,
) -> Run:
    """Keeps `streams` requests going, and kills an engine every so many seconds, at random.

    With `only_streaming`, it must be one of which streams have told something.
    """
    random, run = Random(seed), Run()

    async def worker(index: int) -> None:
        own, count = Random(f"{seed}/{index}"), 0
        while run.num_kills < kills:
            await _read(front, f"{index}.{count}", random_job(own), run)
            count += 1

    workers = [asyncio.create_task(worker(index)) for index in range(streams)]
    while run.num_kills < kills and not any(task.done() for task in workers):
        await asyncio.sleep(random.uniform(*seconds))
        living = [each for each in front.replicas() if each.pid is not None]
        if not living:
            continue
        victim = random.choice(living)
        assert victim.pid is not None
        # What is told before it is a stream; whole answers wait for something else.
        hit = [name for name in run.last if front.replica_of(name) == victim.index]
        if only_streaming and not hit:
            continue
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended since
            continue
        run.num_kills += 1
        now = time.monotonic()
        run.hit.update((name, now) for name in hit if name not in run.hit)
    await asyncio.gather(*workers)
    return run


def undisturbed(artifact: Artifact, told: Sequence[tuple[Job, RequestOutput]]) -> list[Any]:
    """The same requests in one engine, with the seeds that were drawn."""
    engine = Engine.open(artifact, RuntimeOptions(kv_memory=KV_MEMORY, threads=2))
    parts: dict[str, list[RequestOutput]] = {}
    for index, (job, output) in enumerate(told):
        parts[str(index)] = []
        engine.add_request(str(index), job.prompt, replace(job.params, seed=output.seed))
    while engine.has_unfinished:
        for output in engine.step():
            parts[output.request_id].append(output)
    engine.close()
    return [transcript(merge_outputs(each)) for each in parts.values()]


def transcript(output: RequestOutput) -> tuple[object, ...]:
    """All that a client is told."""
    return (output.outputs, output.prompt_token_ids, output.prompt_logprobs, output.error)


def differing(artifact: Artifact, run: Run) -> list[Job]:
    """The requests whose transcripts differ from the undisturbed ones."""
    alone = undisturbed(artifact, run.told)
    pairs = zip(run.told, alone, strict=True)
    return [job for (job, output), right in pairs if transcript(output) != right]


def quantile(values: Sequence[float], share: float) -> float:
    """By the nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, nargs=2, default=(0.5, 2.5))
    arguments = parser.parse_args()
    artifact = open_artifact(arguments.artifact)
    options = RuntimeOptions(kv_memory=KV_MEMORY)
    for count in arguments.replicas:
        front = open_front(artifact, options, count)
        try:
            front.wait_until_open()
            disturbed = disturb(
                front,
                kills=arguments.kills,
                streams=arguments.streams,
                seed=arguments.seed,
                seconds=tuple(arguments.seconds),
            )
            run = asyncio.run(disturbed)
            resumed = sum(each.num_resumed for each in front.replicas())
        finally:
            front.shutdown()
        result = {
            "replicas": count,
            "kills": run.num_kills,
            "requests": len(run.told),
            "resumed": resumed,
            "different": len(differing(artifact, run)),
            "pauses": len(run.pauses),
            "pause_p50_s": round(quantile(run.pauses, 0.5), 3),
            "pause_p99_s": round(quantile(run.pauses, 0.99), 3),
            "pause_max_s": round(max(run.pauses), 3),
            "load": os.getloadavg()[0],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
