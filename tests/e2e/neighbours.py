"""Requests beside others, and alone: what a request gets must not depend on its neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, RequestError
from infc.runtime.engine import Engine
from infc.runtime.options import RuntimeOptions
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.requests.sequence_blocks import SequenceBlocks
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.sampling.token_logprobs import TokenLogprobs
from infc.runtime.scheduling.blocks import BlockPool
from infc.runtime.scheduling.kv_cache import KvCache

from .support import prompts

Answer = tuple[
    tuple[tuple[tuple[int, ...], tuple[TokenLogprobs, ...]], ...],
    tuple[TokenLogprobs | None, ...] | None,
]
"""Tokens and log-probabilities of each choice, and log-probabilities of the prompt."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request, when it comes, and when its user gives up."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    cancel_after: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A set of jobs and the engine they meet."""

    jobs: tuple[Job, ...]
    blocks: int
    step_tokens: int
    max_sequences: int
    threads: int


PENALTIES: dict[str, Any] = {
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {7: 2.0},
    "banned_token_ids": [11],
    "min_tokens": 1,
}


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Prompts share beginnings, so that prefixes are found again."""
    family = prompts(320, (96, 96))[draw(st.integers(0, 1))]
    shared = draw(st.integers(0, 80))
    tail = draw(st.lists(st.integers(0, 255), min_size=1, max_size=12))
    greedy = draw(st.booleans())
    params = SamplingParams(
        temperature=0.0 if greedy else draw(st.sampled_from([0.7, 1.3])),
        top_k=0 if greedy else draw(st.sampled_from([0, 20])),
        top_p=1.0 if greedy else draw(st.sampled_from([1.0, 0.9])),
        seed=None if greedy else draw(st.integers(0, 5)),
        max_tokens=draw(st.integers(1, 40)),
        ignore_eos=True,
        logprobs=draw(st.sampled_from([3, 3, None])),
        n=draw(st.sampled_from([1, 1, 2, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        **draw(st.sampled_from([{}, PENALTIES])),
    )
    cancel = draw(st.one_of(st.none(), st.none(), st.integers(0, 12)))
    arrival, priority = draw(st.integers(0, 6)), draw(st.integers(0, 2))
    return Job((*family[:shared], *tail), params, arrival, cancel, priority)


runs = st.builds(
    Run,
    jobs=st.lists(jobs(), min_size=2, max_size=7).map(tuple),
    blocks=st.integers(5, 16),
    step_tokens=st.sampled_from([5, 16, 33, 64, 256]),
    max_sequences=st.integers(1, 6),
    threads=st.sampled_from([1, 2]),
)


CROWDED = Run(
    jobs=tuple(
        Job(
            prompt=(*prompts(320, (96,))[0][:16], *range(i, i + 3)),
            params=SamplingParams(
                temperature=0.5 * (i % 2), seed=i, max_tokens=60, ignore_eos=True, logprobs=3
            ),
            arrival=i // 3,
        )
        for i in range(6)
    ),
    blocks=10,
    step_tokens=64,
    max_sequences=6,
    threads=2,
)
"""More growth than blocks: somebody must be preempted."""


SHARED = Run(
    jobs=tuple(
        Job(
            prompt=tuple(prompts(320, (96,))[0][: 37 + 8 * i]),
            params=SamplingParams(
                temperature=1.0,
                seed=i,
                max_tokens=24,
                ignore_eos=True,
                logprobs=3,
                n=3,
                prompt_logprobs=2 * (i % 2),
                **PENALTIES,
            ),
            arrival=i,
        )
        for i in range(3)
    ),
    blocks=16,
    step_tokens=33,
    max_sequences=6,
    threads=2,
)
"""Choices that share blocks, of prompts that end inside one, and too few blocks for all."""


def block_bytes(artifact: Artifact) -> int:
    """Bytes of one block in every group."""
    return sum(group.bytes_per_block() for group in artifact.manifest.main.resources)


def answer_alone(artifact: Artifact, job: Job) -> Answer:
    """A fresh engine, the prompt in one chunk, nothing reused, two threads.

    It runs one sequence: each choice is computed from its prompt on by itself.
    """
    options = RuntimeOptions(
        prefix_reuse=False, kv_memory=40 * block_bytes(artifact), threads=2, max_sequences=1
    )
    engine = Engine.open(artifact, options)
    try:
        engine.add_request("alone", list(job.prompt), job.params)
        parts: list[RequestOutput] = []
        while engine.has_unfinished:
            parts.extend(engine.step())
    finally:
        engine.close()
    return answer_of(parts)


def answer_of(parts: list[RequestOutput]) -> Answer:
    whole = merge_outputs(parts)
    choices = tuple((choice.token_ids, choice.logprobs or ()) for choice in whole.outputs)
    return choices, whole.prompt_logprobs


@dataclass(slots=True)
class Events:
    """What happened over all runs, so that a test can say that it did."""

    counts: Counter[str]

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count blocks whose content is given up, those shared with their writer, and copies."""
        allocate, copy, take = BlockPool.allocate, KvCache._copy_on_write, KvCache._take_hit

        def counted(pool: BlockPool) -> int:
            before = pool.num_cached
            block = allocate(pool)
            self.counts["evictions"] += before - pool.num_cached
            return block

        def copied(kv: KvCache, blocks: SequenceBlocks, g: int, index: int) -> None:
            self.counts["copies on write"] += kv.pools[g].references(blocks.ids[g][index]) > 1
            copy(kv, blocks, g, index)

        def taken(kv: KvCache, blocks: SequenceBlocks, hit: int, num_tokens: int) -> None:
            registered_early = hit > 0 and kv._is_registered_early(blocks.digests[hit - 1])
            self.counts["prefixes of the same step"] += registered_early
            take(kv, blocks, hit, num_tokens)

        monkeypatch.setattr(BlockPool, "allocate", counted)
        monkeypatch.setattr(KvCache, "_take_hit", taken)
        monkeypatch.setattr(KvCache, "_copy_on_write", copied)


def play(artifact: Artifact, run: Run, events: Events) -> Iterator[tuple[Job, Answer]]:
    """The jobs through one engine; yields those that were neither refused nor cancelled."""
    options = RuntimeOptions(
        kv_memory=run.blocks * block_bytes(artifact),
        step_tokens=run.step_tokens,
        max_sequences=run.max_sequences,
        threads=run.threads,
    )
    try:
        engine = Engine.open(artifact, options)
    except CapacityError:
        return
    parts: dict[int, list[RequestOutput]] = {}
    refused: set[int] = set()
    cancelled: set[int] = set()
    try:
        now = 0
        while engine.has_unfinished or now <= max(job.arrival for job in run.jobs):
            for i, job in enumerate(run.jobs):
                if job.arrival == now:
                    try:
                        engine.add_request(str(i), list(job.prompt), job.params, job.priority)
                        parts[i] = []
                    except (RequestError, CapacityError):
                        refused.add(i)
                gives_up = job.cancel_after is not None and now == job.arrival + job.cancel_after
                if gives_up and i not in refused and engine.abort(str(i)) is not None:
                    cancelled.add(i)
            for output in engine.step():
                parts[int(output.request_id)].append(output)
            engine.scheduler.check()
            now += 1
        events.counts["preemptions"] += engine.stats().num_preemptions
        assert engine.stats().num_free_blocks == engine.stats().num_blocks, "blocks leak"
    finally:
        engine.close()
    for i, outputs in parts.items():
        if i not in cancelled:
            events.counts["prefix hits"] += outputs[-1].metrics.num_cached_tokens > 0
            events.counts["survivors"] += 1
            events.counts["prompts with logprobs"] += outputs[0].prompt_logprobs is not None
            yield run.jobs[i], answer_of(outputs)


def compare_with_alone(
    artifact: Artifact, events: Events, num_examples: int, threads: Sequence[int] = ()
) -> None:
    """Plays runs, and asserts that each survivor got what it gets alone, on two threads.

    Each run is played on so many `threads`, one after the other, or on those that it draws.
    """
    alone: dict[tuple[tuple[int, ...], SamplingParams], Answer] = {}

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(runs)
    @example(CROWDED)
    @example(SHARED)
    def check(run: Run) -> None:
        for count in threads or (run.threads,):
            for job, got in play(artifact, replace(run, threads=count), events):
                key = (job.prompt, job.params)
                if key not in alone:
                    alone[key] = answer_alone(artifact, job)
                assert got == alone[key]

    check()
