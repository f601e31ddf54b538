"""Requests that are interrupted after every output, and go on in another engine: the same answers.

The other engine has other threads, other chunks of prompts, other neighbours, and knows nothing
but what was told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infc.ir.artifact import Artifact
from infc.runtime.engine import Engine
from infc.runtime.options import RuntimeOptions
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.requests.resumption import Progress, Resumption
from infc.runtime.sampling.sampling_params import SamplingParams

from ..checkpoints import byte_tokenizer, make_checkpoint
from ..configs.base import EOS_ID, VOCAB_SIZE
from .neighbours import block_bytes
from .support import compile_checkpoint

KV_MEMORY = "16MiB"
LETTERS = "abe é你🙂"
"""What most answers are written with: of one to four tokens a character, as each is a byte."""


class Grammar:
    """A constraint with a state: it must be asked before each token, in their order."""

    def __init__(self) -> None:
        self.known: list[int] = []

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        assert list(output_ids[:-1]) == self.known[: len(output_ids) - 1]
        assert len(output_ids) - len(self.known) in (0, 1)
        self.known = list(output_ids)
        allowed: NDArray[np.bool_] = np.random.default_rng([3, *output_ids]).random(256) < 0.3
        return np.concatenate([allowed, np.zeros(VOCAB_SIZE - 256, np.bool_)])

    def rollback(self, num_tokens: int) -> None:
        del self.known[len(self.known) - num_tokens :]

    def fork(self) -> Grammar:
        return Grammar()


@dataclass(frozen=True, slots=True)
class Job:
    """A request. `turns` says at which outputs whoever reads it is behind."""

    prompt: str | tuple[int, ...]
    params: SamplingParams
    is_constrained: bool = False
    cache_salt: str = ""
    turns: tuple[bool, ...] = (True,)


def byte_ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def random_job(random: Random) -> Job:
    """Of all parameters, each often left as it is; most answers are of `LETTERS`."""
    some = random.choice

    def maybe(chance: float, value: Any, otherwise: Any = None) -> Any:
        return value if random.random() < chance else otherwise

    text = "".join(some("abcdefgh éü你🙂") for _ in range(some([1, 5, 12, 20])))
    prompt = maybe(0.5, text) or tuple(byte_ids(text)[: -some([1, 2])] or [97])
    letters = sorted(set(byte_ids(LETTERS)))
    n = some([1, 1, 2, 3])
    fields: dict[str, Any] = {
        "temperature": some([0.0, 0.7, 1.0, 1.5]),
        "top_k": some([0, 0, 1, 12]),
        "top_p": some([1.0, 1.0, 0.9]),
        "min_p": some([0.0, 0.0, 0.05]),
        "repetition_penalty": some([1.0, 1.0, 1.3, 0.8]),
        "presence_penalty": some([0.0, 0.0, 0.7]),
        "frequency_penalty": some([0.0, 0.0, 0.4, -0.3]),
        "logit_bias": maybe(0.3, {letters[2]: 2.0, EOS_ID: 1.0}, {}),
        "allowed_token_ids": maybe(0.6, [*letters, *maybe(0.5, [EOS_ID], [])]),
        "banned_token_ids": maybe(0.2, letters[:1], []),
        "seed": maybe(0.6, some([0, 7, -3, 2**64 - 1])),
        "max_tokens": some([2, 9, 14, 17, 24]),
        "min_tokens": some([0, 0, 1, 2]),
        "stop_token_ids": maybe(0.3, random.sample(letters, 2), []),
        "ignore_eos": maybe(0.4, True, False),
        "logprobs": maybe(0.5, some([0, 1, 3])),
        "prompt_logprobs": maybe(0.25, some([0, 2])),
        "n": n,
        "skip_special_tokens": maybe(0.8, True, False),
    }
    turns = some([(True,), (True,), (True, False), (False, False, True)])
    salt = maybe(0.2, "a salt", "")
    constrained = maybe(0.15, True, False)
    if constrained:
        fields["allowed_token_ids"] = None
    return Job(prompt, SamplingParams(**fields), constrained, salt, turns)


def open_engine(artifact: Artifact, **options: Any) -> Engine:
    return Engine.open(artifact, RuntimeOptions(**{"kv_memory": KV_MEMORY, **options}))


def play(
    engine: Engine, jobs: Mapping[str, tuple[Job, Resumption | None]]
) -> dict[str, list[RequestOutput]]:
    """What all of them are told together, by their names."""
    parts: dict[str, list[RequestOutput]] = {name: [] for name in jobs}
    for name, (job, resumed) in jobs.items():
        engine.add_request(
            name,
            job.prompt,
            job.params,
            cache_salt=job.cache_salt,
            constraint=Grammar() if job.is_constrained else None,
            resumed=resumed,
        )
    step = 0
    while engine.has_unfinished:
        for name, stream in engine._publisher.streams.items():
            if not stream.tells_at_end and parts[name]:
                turns = jobs[name][0].turns
                stream.is_wanted = turns[step % len(turns)]
        for output in engine.step():
            parts[output.request_id].append(output)
        step += 1
    engine.scheduler.check()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks, "blocks leak"
    return parts


def with_stops(job: Job, answer: RequestOutput, random: Random) -> Job:
    """The same with stop strings: one out of its answer, and one that is begun and never comes."""
    text = max((one.text for one in answer.outputs), key=len)
    if len(text) < 4 or random.random() < 0.4:
        return job
    begin = random.randrange(len(text) - 2)
    length = random.choice([1, 2, 3, 5])
    stops = [text[begin : begin + length]] if random.random() < 0.6 else []
    stops.append(text[begin : begin + 2] + "never")
    stops += ["</s>"] * (random.random() < 0.3)
    return replace(job, params=replace(job.params, stop=stops))


def through_json(resumed: Resumption) -> Resumption:
    return Resumption.from_data(json.loads(json.dumps(resumed.as_data())))


def cut(parts: Sequence[RequestOutput], count: int) -> Resumption:
    resumed = Progress(parts[:count]).resumption()
    assert resumed is not None
    return through_json(resumed)


def told(parts: Sequence[RequestOutput]) -> tuple[object, ...]:
    """All of an answer but its name and times."""
    whole = merge_outputs(parts)
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(part.prompt_logprobs is not None for part in parts) <= 1
    return (
        whole.outputs,
        whole.prompt,
        whole.prompt_token_ids,
        whole.prompt_logprobs,
        whole.error,
        whole.seed,
    )


def events_of(job: Job, resumed: Resumption, whole: RequestOutput) -> set[str]:
    """What a cut meets, so that a test can say that it did."""
    backend, params = byte_tokenizer(), job.params
    events = {"cuts"}
    for index, choice in enumerate(resumed.choices):
        if choice.has_ended:
            events.add("choices that ended")
            continue
        text = backend.decode(
            list(choice.token_ids), skip_special_tokens=params.skip_special_tokens
        )
        if text.endswith("\ufffd"):
            events.add("inside characters")
        elif params.stop_strings and choice.num_characters < len(text):
            events.add("inside what may be a stop string")
        if isinstance(whole.outputs[index].stop_reason, str):
            events.add("before stop strings")
    if len({len(choice.token_ids) for choice in resumed.choices}) > 1:
        events.add("choices of several lengths")
    if params.prompt_logprobs is not None:
        events.add("with log-probabilities of the prompt")
    if job.is_constrained:
        events.add("with constraints")
    return events


EVENTS = {
    "before stop strings",
    "choices of several lengths",
    "choices that ended",
    "cuts",
    "inside characters",
    "inside what may be a stop string",
    "twice",
    "with constraints",
    "with log-probabilities of the prompt",
}


def check_every_cut(artifact: Artifact, seed: int, num_jobs: int) -> Counter[str]:
    """Interrupts each of some random requests after each of its outputs; what the cuts met.

    One in three is interrupted once more.
    """
    random = Random(seed)
    jobs = {f"{seed}.{i}": random_job(random) for i in range(num_jobs)}
    engine = open_engine(artifact, threads=1, max_sequences=7)  # choices begin one by one
    drafts = play(engine, {name: (job, None) for name, job in jobs.items()})
    jobs = {
        name: with_stops(job, merge_outputs(drafts[name]), random) for name, job in jobs.items()
    }
    whole = play(engine, {name: (job, None) for name, job in jobs.items()})
    engine.close()
    cuts = [(name, count) for name, parts in whole.items() for count in range(1, len(parts))]
    random.shuffle(cuts)
    met: Counter[str] = Counter()
    others = (
        open_engine(artifact, threads=2, step_tokens=23, kv_memory=12 * block_bytes(artifact)),
        open_engine(artifact, threads=1, step_tokens=8, max_sequences=5, prefix_reuse=False),
    )
    again: list[tuple[str, list[RequestOutput]]] = []
    for which, other in enumerate(others):
        taken = {
            f"{name}/{count}": (jobs[name], cut(whole[name], count))
            for name, count in cuts[which::2]
        }
        for key, rest in play(other, taken).items():
            name, _, count = key.rpartition("/")
            met.update(events_of(jobs[name], taken[key][1], merge_outputs(whole[name])))
            parts = [*whole[name][: int(count)], *rest]
            assert told(parts) == told(whole[name]), (key, jobs[name])
            if len(rest) > 1:
                again.append((name, parts[: int(count) + random.randrange(1, len(rest))]))
    chosen = dict(enumerate(again[::3]))
    resumed = {str(i): (jobs[name], cut(parts, len(parts))) for i, (name, parts) in chosen.items()}
    for key, rest in play(others[0], resumed).items():
        name, parts = chosen[int(key)]
        met["twice"] += 1
        assert told([*parts, *rest]) == told(whole[name]), (name, jobs[name])
    for other in others:
        other.close()
    return met


def build(place: Path, arch: str, dtype: str = "float32", **sets: Any) -> Artifact:
    """A small model whose tokens are bytes."""
    make_checkpoint(arch, place / "checkpoint", seed=5, tokenizer=True)
    return compile_checkpoint(place / "checkpoint", place / "artifact", dtype=dtype, **sets)


def test_interrupted_anywhere_answers_are_the_same(tmp_path: Path) -> None:
    """Of a model with a window."""
    met = check_every_cut(build(tmp_path, "mistral"), 1, 80)
    assert met["cuts"] > 400
    assert {event for event, count in met.items() if count >= 10} == EVENTS


@pytest.mark.breadth
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "sets"),
    [
        ("mistral", "float32", {}),
        ("mixtral", "bfloat16", {}),
        ("qwen3", "bfloat16", {"quantization": "int8", "kv_cache.dtype": "int8"}),
    ],
)
def test_many_answers_are_the_same(
    arch: str, dtype: str, sets: dict[str, Any], tmp_path: Path
) -> None:
    artifact = build(tmp_path, arch, dtype, **sets)
    assert sum(check_every_cut(artifact, seed, 80)["cuts"] for seed in range(2, 8)) > 2500
