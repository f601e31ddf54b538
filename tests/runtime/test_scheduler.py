"""The scheduler against a checked cache: any order of arrivals, ends, chunks and pool sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from infc.ir.errors import CapacityError, RequestError
from infc.runtime.admission import SchedulerLimits
from infc.runtime.kv_cache import KvCache
from infc.runtime.outputs import TokenLogprobs
from infc.runtime.request import Request, RequestState
from infc.runtime.sampler import sample
from infc.runtime.sampling_params import SamplingParams
from infc.runtime.scheduler import Scheduler
from infc.runtime.step import Step
from infc.runtime.step_results import read_results
from infc.runtime.token_logprobs import raw_logprobs

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
    step: Step | None = None,
    given: PromptEntries | None = None,
) -> Step | None:
    step = step or scheduler.schedule()
    if step is not None:
        assert len(step.logits_index) <= scheduler.limits.logit_rows
        assert step.num_tokens <= scheduler.limits.step_tokens
        results = read_results(model.run(step), step)
        for rows, entries in zip(step.prompt_rows, results.prompts, strict=True):
            if given is not None and rows.request.state is not RequestState.FINISHED:
                positions = itertools.count(rows.first_position)
                given.setdefault(rows.request, []).extend(
                    zip(positions, entries or (), strict=False)
                )
        scheduler.commit(step, [sample.token_id for sample in results.samples])
        scheduler.check()
    return step


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


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are cancelled and preempted in any order."""

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        block_size = data.draw(st.integers(1, 4))
        windows = data.draw(st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3))
        blocks = [data.draw(st.integers(2, 24)) for _ in windows]
        self.scheduler, self.model = build(
            block_size,
            windows,
            blocks,
            step_tokens=data.draw(st.integers(1, 12)),
            max_sequences=data.draw(st.integers(1, 4)),
            logit_rows=data.draw(st.integers(1, 4)),
            max_context=data.draw(st.integers(2, 40)),
            max_waiting=5,
        )
        self.requests: list[Request] = []  # every choice
        self.given: PromptEntries = {}
        self.num_requests = 0
        self.in_flight: Step | None = None

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24),
        extend=st.integers(0, 30),
        max_tokens=st.none() | st.integers(1, 20),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "x"]),
        temperature=st.sampled_from([0.0, 1.0]),
        ends=st.sampled_from([(), (2,)]),
        n=st.sampled_from([1, 1, 1, 2, 3, 6]),
        prompt_logprobs=st.sampled_from([None, None, 0, 2]),
        penalty=st.sampled_from([1.0, 1.0, 2.0]),
        data=st.data(),
    )
    def arrive(
        self,
        prompt: list[int],
        extend: int,
        max_tokens: int | None,
        priority: int,
        salt: str,
        temperature: float,
        ends: tuple[int, ...],
        n: int,
        prompt_logprobs: int | None,
        penalty: float,
        data: st.DataObject,
    ) -> None:
        if self.requests and extend:  # continue an earlier one, so that prefixes are shared
            earlier = data.draw(st.sampled_from(self.requests)).token_ids
            prompt = earlier[:extend] + prompt[: extend % 3]
        self.num_requests += 1
        try:
            choices = add_choices(
                self.scheduler,
                f"r{self.num_requests}",
                prompt,
                max_tokens=max_tokens,
                priority=priority,
                salt=salt,
                temperature=temperature,
                seed=len(prompt),
                stop_token_ids=ends,
                n=n,
                prompt_logprobs=prompt_logprobs,
                repetition_penalty=penalty,
            )
        except CapacityError:
            assert self.scheduler.num_waiting >= 5
        except RequestError as error:
            total = len(prompt) + (max_tokens or 1)
            limit = self.scheduler.limits.max_context
            held = self.scheduler.kv.holds_alone((limit if max_tokens is None else total) - 1)
            if total <= limit and held:
                raise AssertionError("refused, and it fits") from error
        else:
            self.requests += choices

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def schedule(self) -> None:
        self.in_flight = self.scheduler.schedule()

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def commit(self) -> None:
        run_step(self.scheduler, self.model, self.in_flight, self.given)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def discard(self) -> None:
        assert self.in_flight is not None
        self.scheduler.discard(self.in_flight)
        broken = {r.request_id for r in self.in_flight.requests}
        assert all(r.finish_reason for r in self.requests if r.request_id in broken)
        self.in_flight = None

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.requests)).request_id
        before = {r: r.finish_reason for r in self.requests if r.request_id == name}
        ended = self.scheduler.abort(name)
        assert set(ended) == {r for r, reason in before.items() if reason is None}
        assert all(r.finish_reason == (reason or "abort") for r, reason in before.items())

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.in_flight is not None:
            run_step(self.scheduler, self.model, self.in_flight, self.given)
        finish_all(self.scheduler, self.model, self.given)
        for request in self.requests:
            if request.choice == 0 and request.params.prompt_logprobs is not None:
                given, wanted = self.given.get(request, []), prompt_alone(request)
                whole = request.finish_reason in ("stop", "length")
                assert given == (wanted if whole else wanted[: len(given)])
            expected = alone(request)
            if request.finish_reason in ("stop", "length"):
                assert request.token_ids == expected
            else:
                assert request.finish_reason in ("abort", "error")
                assert request.token_ids == expected[: len(request.token_ids)]


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=150, stateful_step_count=40)
    )


def test_preemption_recomputes_the_same_tokens() -> None:
    scheduler, model = build(2, [None], [13], max_context=20)
    requests = [add(scheduler, f"r{i}", [i % VOCAB] * 6, max_tokens=12) for i in range(3)]
    finish_all(scheduler, model)
    assert scheduler.num_preemptions > 0
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]
    assert requests[0].num_preemptions == 0, "the first to come is never preempted"


def test_full_hit_computes_one_token_in_a_copy() -> None:
    scheduler, model = build(4, [None], [20])
    prompt = [0, 1, 2, 0, 1, 1, 1, 2]
    first = add(scheduler, "first", prompt, max_tokens=1)
    finish_all(scheduler, model)
    again = add(scheduler, "again", prompt, max_tokens=1)
    other = add(scheduler, "other", prompt, max_tokens=1, salt="another tenant")
    before = model.num_tokens
    finish_all(scheduler, model)
    assert again.num_cached_tokens == 7
    assert other.num_cached_tokens == 0
    assert model.num_copies == 1
    assert model.num_tokens - before == 1 + 8
    assert again.token_ids == other.token_ids == first.token_ids


def test_full_hit_without_room_for_the_copy_uses_one_block_less() -> None:
    scheduler, model = build(4, [None], [3], max_context=12)
    prompt = [0, 1, 2, 0] * 2
    first = add(scheduler, "first", prompt, max_tokens=1)
    finish_all(scheduler, model)
    again = add(scheduler, "again", prompt, max_tokens=1)
    finish_all(scheduler, model)
    assert again.num_cached_tokens == 4
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize(("kept", "cached"), [(True, 12), (False, 0)])
def test_windowed_hit_needs_the_last_window(kept: bool, cached: int) -> None:
    """The full group has every block; the windowed one counts only while its last blocks live."""
    scheduler, model = build(4, [None, 6], [40, 12], step_tokens=16)
    add(scheduler, "first", [0, 1, 2, 0] * 3, max_tokens=4)
    finish_all(scheduler, model)
    if not kept:
        add(scheduler, "evicts", [1, 1, 0, 2] * 6, max_tokens=10, salt="x")
        add(scheduler, "evicts too", [2, 1, 0, 2] * 5, max_tokens=10, salt="x")
        finish_all(scheduler, model)
        assert scheduler.kv.pools[1].num_evictions > 0
    again = add(scheduler, "again", [0, 1, 2, 0] * 3 + [1], max_tokens=1)
    finish_all(scheduler, model)
    assert again.num_cached_tokens == cached


def test_windows_bound_the_blocks_of_long_sequences() -> None:
    scheduler, model = build(2, [4], [6], max_context=400, step_tokens=3)
    request = add(scheduler, "long", [0, 1, 2] * 60, max_tokens=200)
    finish_all(scheduler, model)
    assert request.token_ids == alone(request)
    assert request.num_preemptions == 0


def test_long_prompt_does_not_stall_the_others() -> None:
    scheduler, model = build(4, [None], [200], max_context=200, step_tokens=8)
    add(scheduler, "long", [0] * 100, max_tokens=1)
    run_step(scheduler, model)
    short = add(scheduler, "short", [1], max_tokens=30)
    # The long prompt takes the whole budget, so the short one starts once it is through.
    steps = 0
    while not short.num_output_tokens:
        run_step(scheduler, model)
        steps += 1
    assert steps <= 13
    add(scheduler, "long too", [2] * 100, max_tokens=1)
    for _ in range(10):
        before = short.num_output_tokens
        run_step(scheduler, model)
        assert short.num_output_tokens == before + 1


def test_priority_goes_first_and_equals_in_order() -> None:
    scheduler, model = build(4, [None], [40], max_sequences=1, logit_rows=1)
    requests = {
        name: add(scheduler, name, [0, 1], max_tokens=2, priority=priority)
        for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1))
    }
    finish_all(scheduler, model)
    times = {name: r.finished_time or 0.0 for name, r in requests.items()}
    assert sorted(times, key=times.__getitem__) == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [([], 1, "prompt"), ([0] * 40, None, "prompt"), ([0] * 30, 11, "max_tokens")],
)
def test_what_can_never_fit_is_refused(
    prompt: list[int], max_tokens: int | None, field: str
) -> None:
    scheduler, _ = build(4, [None], [40])
    with pytest.raises(RequestError) as caught:
        add(scheduler, "r", prompt, max_tokens=max_tokens)
    assert caught.value.field == field
    assert not scheduler.has_unfinished


def test_request_larger_than_the_pool_is_refused() -> None:
    scheduler, model = build(4, [None], [6])
    with pytest.raises(RequestError, match="more than the KV cache holds"):
        add(scheduler, "r", [0] * 10, max_tokens=12)
    request = add(scheduler, "r", [0] * 10, max_tokens=11)
    finish_all(scheduler, model)
    assert request.num_output_tokens == 11


def test_full_queue_and_used_names_are_refused() -> None:
    scheduler, _ = build(4, [None], [40], max_waiting=2)
    add(scheduler, "a", [0], max_tokens=1)
    with pytest.raises(RequestError, match="in use"):
        add(scheduler, "a", [0], max_tokens=1)
    add(scheduler, "b", [0], max_tokens=1)
    with pytest.raises(CapacityError, match="2 requests waiting already"):
        add(scheduler, "c", [0], max_tokens=1)


def test_cancelled_in_flight_keeps_its_blocks_until_the_step_has_run() -> None:
    scheduler, model = build(4, [None], [10])
    request = add(scheduler, "r", [0] * 10, max_tokens=5)
    step = scheduler.schedule()
    assert step is not None
    scheduler.abort("r")
    scheduler.check()
    assert scheduler.kv.pools[0].num_free < scheduler.kv.pools[0].capacity
    run_step(scheduler, model, step)
    assert request.num_output_tokens == 0
    assert scheduler.kv.pools[0].num_free == scheduler.kv.pools[0].capacity


def test_failed_request_leaves_nothing_to_reuse() -> None:
    scheduler, model = build(4, [None], [10])
    add(scheduler, "bad", [0] * 8, max_tokens=5)
    step = scheduler.schedule()
    assert step is not None
    scheduler.commit(step, [None])
    again = add(scheduler, "again", [0] * 8, max_tokens=1)
    finish_all(scheduler, model)
    assert again.num_cached_tokens == 0


def test_choices_compute_the_prompt_once_and_share_its_blocks() -> None:
    scheduler, model = build(4, [None], [20], step_tokens=16)
    prompt = [0, 1, 2, 0, 1, 1, 1, 2, 0, 1]  # two blocks and a half
    choices = add_choices(scheduler, "r", prompt, max_tokens=5, temperature=1.0, seed=3, n=3)
    run_step(scheduler, model)
    assert model.num_tokens == len(prompt)
    tables = [choice.blocks.ids[0] for choice in choices]
    assert tables[0] == tables[1] == tables[2]
    assert [scheduler.kv.pools[0].references(block) for block in tables[0]] == [3, 3, 3]
    run_step(scheduler, model)
    assert model.num_copies >= 2, (
        "the block that the prompt ends in was copied before it was written"
    )
    assert len({choice.blocks.ids[0][2] for choice in choices}) == 3
    assert [scheduler.kv.pools[0].references(block) for block in tables[0][:2]] == [3, 3]
    finish_all(scheduler, model)
    assert model.num_tokens == len(prompt) + 3 * 4
    assert [choice.token_ids for choice in choices] == [alone(choice) for choice in choices]
    assert len({tuple(choice.token_ids) for choice in choices}) > 1, "choices differ by their index"


def test_choices_of_a_windowed_model_keep_their_own_window() -> None:
    scheduler, model = build(2, [None, 5], [60, 24], max_context=40)
    prompt = [0, 1, 2] * 5
    choices = add_choices(scheduler, "r", prompt, max_tokens=20, temperature=1.0, seed=3, n=3)
    finish_all(scheduler, model)
    assert scheduler.num_preemptions == 0
    assert [choice.token_ids for choice in choices] == [alone(choice) for choice in choices]


def test_more_choices_than_seats_take_turns() -> None:
    scheduler, model = build(4, [None], [40], max_sequences=2)
    choices = add_choices(scheduler, "r", [0, 1] * 3, max_tokens=4, temperature=1.0, seed=1, n=5)
    other = add(scheduler, "other", [2], max_tokens=1)
    finish_all(scheduler, model)
    assert [choice.token_ids for choice in choices] == [alone(choice) for choice in choices]
    assert (other.finished_time or 0) > max(choice.finished_time or 0 for choice in choices[:3])


def test_admission_counts_every_choice() -> None:
    scheduler, model = build(4, [None], [40], max_sequences=4)
    add(scheduler, "first", [0, 1], max_tokens=8)
    run_step(scheduler, model)
    add(scheduler, "many", [1, 2] * 10, max_tokens=8, n=3, temperature=1.0)
    late = add(scheduler, "late", [2], max_tokens=8)
    for _ in range(3):
        run_step(scheduler, model)
    assert scheduler.num_running == 4
    assert late.state is RequestState.WAITING
    # No seat for all of them: none begins.
    scheduler, model = build(4, [None], [40], max_sequences=3)
    add(scheduler, "first", [0, 1], max_tokens=8)
    run_step(scheduler, model)
    many = add(scheduler, "many", [1, 2], max_tokens=8, n=3)
    run_step(scheduler, model)
    assert many.state is RequestState.WAITING
    finish_all(scheduler, model)
    assert scheduler.num_preemptions == 0


def test_a_choice_is_preempted_alone_and_gives_the_same() -> None:
    scheduler, model = build(2, [None], [13], max_context=24)
    choices = add_choices(scheduler, "r", [0, 1, 2, 1, 0], max_tokens=14, temperature=1.0, n=3)
    finish_all(scheduler, model)
    assert choices[0].num_preemptions == 0
    assert choices[2].num_preemptions > 0
    assert [choice.token_ids for choice in choices] == [alone(choice) for choice in choices]


def test_choices_stop_alone_and_are_cancelled_together() -> None:
    scheduler, model = build(4, [None], [40])
    choices = add_choices(
        scheduler, "r", [0, 1], max_tokens=30, temperature=1.0, seed=2, n=4, stop_token_ids=[2]
    )
    while not any(choice.finish_reason for choice in choices):
        run_step(scheduler, model)
    left = [choice for choice in choices if choice.finish_reason is None]
    assert 0 < len(left) < 4
    assert scheduler.get("r") is left[0]
    assert scheduler.abort("r") == left
    assert not scheduler.has_unfinished
    assert scheduler.kv.pools[0].num_free == scheduler.kv.pools[0].capacity


@pytest.mark.parametrize("in_flight", [False, True])
def test_cancelled_before_the_prompt_is_through(in_flight: bool) -> None:
    scheduler, model = build(4, [None], [40], step_tokens=4)
    choices = add_choices(scheduler, "r", [0] * 10, max_tokens=5, n=3)
    run_step(scheduler, model)
    step = scheduler.schedule() if in_flight else None
    assert scheduler.abort("r") == choices
    scheduler.check()
    if step is not None:
        run_step(scheduler, model, step)
    assert not scheduler.has_unfinished
    assert scheduler.kv.pools[0].num_free == scheduler.kv.pools[0].capacity


def test_rows_of_a_prompt_are_bounded_and_leave_the_others_theirs() -> None:
    scheduler, model = build(4, [None], [60], step_tokens=64, logit_rows=5)
    other = add(scheduler, "other", [1], max_tokens=30)
    run_step(scheduler, model)
    request = add(scheduler, "r", [0, 1, 2] * 7, max_tokens=1, prompt_logprobs=2)
    given: PromptEntries = {}
    steps = 0
    while request.finish_reason is None:
        before = other.num_output_tokens
        step = run_step(scheduler, model, given=given)
        assert step is not None and len(step.logits_index) <= 5
        assert other.num_output_tokens == before + 1
        steps += 1
    assert steps == 6  # 21 rows, four a step beside the other's
    assert given[request] == prompt_alone(request)


def test_a_prompt_with_logprobs_takes_nothing_from_the_cache_but_gives_to_it() -> None:
    scheduler, model = build(4, [None], [60])
    prompt = [0, 1, 2, 0, 1, 1, 1, 2, 0]
    add(scheduler, "first", prompt, max_tokens=1)
    finish_all(scheduler, model)
    given: PromptEntries = {}
    scored = add(scheduler, "scored", [*prompt, 1, 1, 1, 2], max_tokens=1, prompt_logprobs=0)
    finish_all(scheduler, model, given)
    assert scored.num_cached_tokens == 0
    assert given[scored] == prompt_alone(scored)
    after = add(scheduler, "after", [*prompt, 1, 1, 1, 2], max_tokens=1)
    finish_all(scheduler, model)
    assert after.num_cached_tokens == 12


def test_preemption_neither_repeats_nor_loses_rows_of_a_prompt() -> None:
    scheduler, model = build(2, [None], [13], max_context=24, step_tokens=4)
    add(scheduler, "first", [0, 1], max_tokens=20)
    for _ in range(3):
        run_step(scheduler, model)
    request = add(scheduler, "r", [1, 2, 0] * 5, max_tokens=4, prompt_logprobs=1)
    given: PromptEntries = {}
    finish_all(scheduler, model, given)
    assert request.num_preemptions > 0
    assert given[request] == prompt_alone(request)
    assert request.token_ids == alone(request)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_a_prompt_may_be_read_and_nothing_generated(length: int) -> None:
    scheduler, model = build(4, [None], [11])
    request = add(scheduler, "r", ([0, 1] * 20)[:length], max_tokens=0, prompt_logprobs=1)
    given: PromptEntries = {}
    finish_all(scheduler, model, given)
    assert request.finish_reason == "length"
    assert request.num_output_tokens == 0
    assert given.get(request, []) == prompt_alone(request)
