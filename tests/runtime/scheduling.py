"""What tests of the scheduler share: a scheduler over a checked cache, run to its end."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

from infc.runtime.executors.base import Finished
from infc.runtime.requests.request import Request
from infc.runtime.sampling.sampler import Sample
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.sampling.token_logprobs import TokenLogprobs, raw_logprobs
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.scheduling.kv_cache import KvCache
from infc.runtime.scheduling.owners import PlannedStep
from infc.runtime.scheduling.scheduler import Scheduler
from infc.runtime.scheduling.step_results import read_results

from .paged_model import Kept, PagedModel, logits_of, make_group, prefix_states
from .samples import sample

VOCAB = 3  # small, so that prompts share prefixes and requests meet their end tokens


PromptEntries = dict[Request, list[tuple[int, TokenLogprobs]]]


def alone(request: Request) -> list[int]:
    """What a choice gives by itself, without any cache."""
    tokens = request.token_ids[: request.num_prompt_tokens]
    twin = Request(request.request_id, tokens, request.params, vocab_size=VOCAB)
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
    block_size: int, windows: list[Kept], blocks: list[int], **limits: int
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
    running: Finished | None = None,
) -> PlannedStep | None:
    """Run a step and settle it; by default the next one, with no other in flight."""
    planned = planned or scheduler.schedule()
    if planned is not None:
        running = running or launch(scheduler, model, planned)
        results = read_results(planned, running.result())
        for request, entries in results.prompts:
            if given is not None:
                known = given.setdefault(request, [])
                known += zip(itertools.count(len(known)), entries or (), strict=False)
        scheduler.settle(planned, [as_run(sample) for sample in results.samples])
        scheduler.check()
    return planned


def as_run(sample: Sample | None) -> list[int] | None:
    """The tokens that a sample is."""
    return None if sample is None or sample.token_id is None else [sample.token_id]


def launch(scheduler: Scheduler, model: PagedModel, planned: PlannedStep) -> Finished:
    """Check a step, and compute it."""
    step = planned.step
    assert len(step.logits_index) <= scheduler.limits.logit_rows
    assert step.num_tokens <= scheduler.limits.step_tokens
    return model.launch(step)


def check_owners(planned: PlannedStep) -> None:
    """Assert that rows and tokens of a step, just planned, are those of the requests behind it."""
    step, owners = planned.step, planned.owners
    assert len(owners.requests) == step.num_sequences
    assert len(owners.sampled) == len(owners.sampled_rows)
    prompt_rows = [p.first_row + i for p in owners.prompt_rows for i in range(p.count)]
    assert sorted({*prompt_rows, *owners.sampled_rows}) == list(range(len(step.logits_index)))
    assert set(prompt_rows).isdisjoint(owners.sampled_rows)
    spans = pairwise(step.query_starts.tolist())
    carried = step.carried[:, 0].tolist()
    for request, (start, stop) in zip(owners.requests, spans, strict=True):
        first = int(step.positions[start])
        if start in carried:
            assert stop == start + 1 and first >= len(request.token_ids)
        else:
            wanted = request.token_ids[first : first + stop - start]
            assert step.token_ids[start:stop].tolist() == wanted


def add(scheduler: Scheduler, name: str, prompt: list[int], **params: Any) -> Request:
    priority, salt = params.pop("priority", 0), params.pop("salt", "")
    request = Request(
        name,
        prompt,
        SamplingParams(**params),
        priority=priority,
        cache_salt=salt,
        vocab_size=VOCAB,
    )
    scheduler.add(request)
    return request


def add_choices(scheduler: Scheduler, name: str, prompt: list[int], **params: Any) -> list[Request]:
    """All choices of a new request."""
    request = add(scheduler, name, prompt, **params)
    return [request, *request.unforked]


def finish_all(
    scheduler: Scheduler,
    model: PagedModel,
    given: PromptEntries | None = None,
    depth: int = 0,
) -> None:
    """Run to the end, planning `depth` steps ahead of the one that runs."""
    in_flight: list[tuple[PlannedStep, Finished]] = []
    for _ in range(5000):
        if (planned := scheduler.schedule()) is not None:
            check_owners(planned)
            in_flight.append((planned, launch(scheduler, model, planned)))
            scheduler.check()
        if not in_flight:
            break
        if planned is None or len(in_flight) > depth:
            first, running = in_flight.pop(0)
            run_step(scheduler, model, first, given, running)
    else:
        raise AssertionError("no progress")
    assert all(pool.num_free == pool.capacity for pool in scheduler.kv.pools)
