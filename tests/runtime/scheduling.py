"""What tests of the scheduler share: a scheduler over a checked cache, run to its end."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

from infc.runtime.requests.request import Request, RequestState
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.sampling.token_logprobs import TokenLogprobs, raw_logprobs
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.scheduling.kv_cache import KvCache
from infc.runtime.scheduling.owners import PlannedStep
from infc.runtime.scheduling.scheduler import Scheduler
from infc.runtime.scheduling.step_results import read_results, sample

from .paged_model import PagedModel, logits_of, make_group, prefix_states

VOCAB = 3  # small, so that prompts share prefixes and requests meet their end tokens


PromptEntries = dict[Request, list[tuple[int, TokenLogprobs]]]


def alone(request: Request) -> list[int]:
    """What a choice gives by itself, without any cache."""
    tokens = request.token_ids[: request.num_prompt_tokens]
    twin = Request(request.request_id, tokens, request.params)
    twin.seed, twin.choice = request.seed, request.choice
    while len(twin.token_ids) < request.max_total_tokens:
        logits = logits_of(prefix_states(twin.token_ids)[-1], VOCAB)
        token = sample(logits, twin).token_id
        assert token is not None
        twin.token_ids.append(token)
        if token in request.end_token_ids:
            break
    return twin.token_ids


def build(
    block_size: int, windows: list[int | None], blocks: list[int], **limits: int
) -> tuple[Scheduler, PagedModel]:
    groups = [make_group(f"g{i}", block_size, w) for i, w in enumerate(windows)]
    full = SchedulerLimits(
        **{"step_tokens": 8, "max_sequences": 4, "logit_rows": 4, "max_context": 40, **limits}
    )
    kv = KvCache(groups, blocks, max_sequences=full.max_running, max_context=full.max_context)
    return Scheduler(full, kv), PagedModel(groups, blocks, VOCAB)


def prompt_alone(request: Request) -> list[tuple[int, TokenLogprobs]]:
    """The log-probabilities that the prompt of a request has by itself, by position."""
    assert request.params.prompt_logprobs is not None
    tokens, count = request.token_ids[: request.num_prompt_tokens], request.params.prompt_logprobs
    states = prefix_states(tokens[:-1])
    return [
        (i, raw_logprobs(logits_of(state, VOCAB), tokens[i + 1], count))
        for i, state in enumerate(states)
    ]


def run_step(
    scheduler: Scheduler,
    model: PagedModel,
    planned: PlannedStep | None = None,
    given: PromptEntries | None = None,
) -> PlannedStep | None:
    planned = planned or scheduler.schedule()
    if planned is not None:
        step, owners = planned.step, planned.owners
        assert len(step.logits_index) <= scheduler.limits.logit_rows
        assert step.num_tokens <= scheduler.limits.step_tokens
        check_owners(planned)
        results = read_results(planned, model.launch(step).result())
        for rows, entries in zip(owners.prompt_rows, results.prompts, strict=True):
            if given is not None and rows.request.state is not RequestState.FINISHED:
                positions = itertools.count(rows.first_position)
                given.setdefault(rows.request, []).extend(
                    zip(positions, entries or (), strict=False)
                )
        scheduler.commit(planned, [sample.token_id for sample in results.samples])
        scheduler.check()
    return planned


def check_owners(planned: PlannedStep) -> None:
    """Assert that rows and tokens of a step are those of the requests behind it."""
    step, owners = planned.step, planned.owners
    assert len(owners.requests) == step.num_sequences
    assert len(owners.sampled) == len(owners.sampled_rows)
    prompt_rows = [p.first_row + i for p in owners.prompt_rows for i in range(p.count)]
    assert sorted({*prompt_rows, *owners.sampled_rows}) == list(range(len(step.logits_index)))
    assert set(prompt_rows).isdisjoint(owners.sampled_rows)
    spans = pairwise(step.query_starts.tolist())
    for request, (start, stop) in zip(owners.requests, spans, strict=True):
        first = int(step.positions[start])
        wanted = request.token_ids[first : first + stop - start]
        assert step.token_ids[start:stop].tolist() == wanted


def add(scheduler: Scheduler, name: str, prompt: list[int], **params: Any) -> Request:
    priority, salt = params.pop("priority", 0), params.pop("salt", "")
    request = Request(name, prompt, SamplingParams(**params), priority=priority, cache_salt=salt)
    scheduler.add(request)
    return request


def add_choices(scheduler: Scheduler, name: str, prompt: list[int], **params: Any) -> list[Request]:
    """All choices of a new request."""
    request = add(scheduler, name, prompt, **params)
    return [request, *request.unforked]


def finish_all(scheduler: Scheduler, model: PagedModel, given: PromptEntries | None = None) -> None:
    steps = 0
    while run_step(scheduler, model, given=given) is not None:
        steps += 1
        assert steps < 5000, "no progress"
    assert all(pool.num_free == pool.capacity for pool in scheduler.kv.pools)
