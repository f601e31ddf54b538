"""Requests that arrive together compute a prefix that they share once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.runtime.requests.request import Request, RequestState
from infc.runtime.scheduling.owners import PlannedStep
from infc.runtime.scheduling.scheduler import Scheduler

from .paged_model import KEPT, Kept, PagedModel
from .scheduling import VOCAB, add, alone, build, finish_all, run_step

Owners = dict[tuple[int, ...], set[str]]

SHARED = [0, 1, 2, 2, 0, 1, 1, 0] * 6  # twelve blocks of 4


def burst(scheduler: Scheduler, count: int, own: int = 4, **params: object) -> list[Request]:
    """Requests that begin alike and end each in its own way."""
    tails = [[i // 27 % 3, i // 9 % 3, i // 3 % 3, i % 3][:own] for i in range(count)]
    return [add(scheduler, f"r{i}", SHARED + tail, **params) for i, tail in enumerate(tails)]


def wide(windows: list[Kept] | None = None) -> tuple[Scheduler, PagedModel]:
    """Room for 32 sequences, 64 tokens a step."""
    windows = windows or [None]
    return build(
        4,
        windows,
        [400] * len(windows),
        step_tokens=64,
        max_sequences=32,
        logit_rows=32,
        max_context=100,
    )


@pytest.mark.parametrize("windows", [[None], [None, 6], [9], [None, "state"]])
def test_a_burst_computes_its_prefix_once(windows: list[Kept]) -> None:
    scheduler, model = wide(windows)
    requests = burst(scheduler, 32, max_tokens=1)
    steps = 0
    while run_step(scheduler, model) is not None:
        steps += 1
    assert model.num_tokens == len(SHARED) + 32 * 4
    assert steps == -(-model.num_tokens // 64), "no step had room left while somebody waited"
    assert [r.num_cached_tokens for r in requests] == [0] + 31 * [len(SHARED)]
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]


def test_a_prefix_longer_than_a_step_is_computed_once() -> None:
    scheduler, model = build(
        4, [None], [400], step_tokens=20, max_sequences=8, logit_rows=8, max_context=100
    )
    requests = burst(scheduler, 8, max_tokens=1)
    finish_all(scheduler, model)
    assert model.num_tokens == len(SHARED) + 8 * 4
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]


def test_equal_prompts_share_all_but_their_last_block() -> None:
    """Its copy would be made before the step that writes it."""
    scheduler, model = wide()
    requests = burst(scheduler, 3, own=0, max_tokens=6)
    run_step(scheduler, model)
    assert model.num_tokens == len(SHARED) + 2 * 4
    assert model.num_copies == 0
    finish_all(scheduler, model)
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]
    again = burst(scheduler, 1, own=0, max_tokens=1)[0]
    run_step(scheduler, model)
    assert again.num_cached_tokens == len(SHARED) - 1


def test_tenants_and_prompts_with_logprobs_take_nothing() -> None:
    scheduler, model = wide()
    first = add(scheduler, "first", SHARED, max_tokens=1)
    tenant = add(scheduler, "tenant", SHARED, max_tokens=1, salt="another")
    finish_all(scheduler, model)
    assert (first.num_cached_tokens, tenant.num_cached_tokens) == (0, 0)
    assert model.num_tokens == 2 * len(SHARED)
    prompt = [2, *SHARED[:11]]
    before = model.num_tokens
    add(scheduler, "third", prompt, max_tokens=1)
    scored = add(scheduler, "scored", prompt, max_tokens=1, prompt_logprobs=0)
    finish_all(scheduler, model)
    assert scored.num_cached_tokens == 0
    assert model.num_tokens - before == 2 * len(prompt)


def test_whoever_computes_the_prefix_may_be_cancelled() -> None:
    scheduler, model = wide()
    requests = burst(scheduler, 4, max_tokens=6)
    step = scheduler.schedule()
    scheduler.abort(requests[0].request_id)
    scheduler.check()
    run_step(scheduler, model, step)
    finish_all(scheduler, model)
    assert model.num_tokens < 2 * len(SHARED)
    assert [r.token_ids for r in requests[1:]] == [alone(r) for r in requests[1:]]


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_a_step_had_promised_is_not_found_when_it_is_given_up(cancelled: bool) -> None:
    scheduler, model = wide()
    requests = burst(scheduler, 3, max_tokens=1)
    step = scheduler.schedule()
    assert step is not None
    assert step.step.num_sequences == 3
    late = burst_late(scheduler)
    if cancelled:
        scheduler.abort(requests[0].request_id)
    scheduler.discard(step)
    scheduler.check()
    assert all(r.state is RequestState.FINISHED for r in requests)
    assert scheduler.kv.pools[0].num_cached == 0
    finish_all(scheduler, model)
    assert late.num_cached_tokens == 0
    assert late.token_ids == alone(late)


def burst_late(scheduler: Scheduler) -> Request:
    """One that comes while the step of the others runs."""
    return add(scheduler, "late", [*SHARED, 1], max_tokens=3)


def note_computed(planned: PlannedStep, block_size: int, owners: Owners) -> None:
    """Which requests compute something of a prompt's full blocks, by the prefix that ends there.

    A prompt's end is left out: it must compute a token in a block of its own.
    """
    step = planned.step
    for request, (start, stop), length in zip(
        planned.owners.requests,
        pairwise(step.query_starts.tolist()),
        step.context_lengths.tolist(),
        strict=True,
    ):
        full = min((request.num_prompt_tokens - 1) // block_size, -(-length // block_size))
        for index in range((length - (stop - start)) // block_size, full):
            prefix = tuple(request.token_ids[: (index + 1) * block_size])
            owners.setdefault(prefix, set()).add(request.request_id)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_block_is_computed_twice(data: st.DataObject) -> None:
    """Whatever arrives when: with room for all, a full block is computed by one request alone."""
    size = data.draw(st.integers(1, 4))
    windows = data.draw(st.lists(KEPT.filter(lambda kept: kept != 1), min_size=1, max_size=2))
    scheduler, model = build(
        size,
        windows,
        [2000] * len(windows),
        step_tokens=data.draw(st.integers(4, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        logit_rows=8,
    )
    stem = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=24))
    arrivals = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    requests: list[Request] = []
    owners: Owners = {}
    while arrivals or scheduler.has_unfinished:
        for _ in range(arrivals.pop() if arrivals else 0):
            tail = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
            prompt = stem[: data.draw(st.integers(0, 24))] + tail
            priority = data.draw(st.integers(-1, 1))
            name = f"r{len(requests)}"
            requests.append(add(scheduler, name, prompt, max_tokens=1, priority=priority))
        if (step := scheduler.schedule()) is not None:
            note_computed(step, size, owners)
            run_step(scheduler, model, step)
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]
    assert all(len(names) == 1 for names in owners.values())
