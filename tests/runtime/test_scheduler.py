"""The scheduler against a checked cache: any order of arrivals, ends, chunks and pool sizes."""

from __future__ import annotations

import pytest
from hypothesis import assume, settings
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
from infc.runtime.executors.base import Finished
from infc.runtime.requests.request import Request
from infc.runtime.scheduling.owners import PlannedStep

from .paged_model import KEPT
from .scheduling import (
    VOCAB,
    PromptEntries,
    add,
    add_choices,
    alone,
    build,
    check_owners,
    finish_all,
    launch,
    prompt_alone,
    run_step,
)

PENALTIES: list[dict[str, float]] = [
    {},
    {"repetition_penalty": 2.0},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5},
]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are cancelled and preempted in any order."""

    depth = 0  # steps that are planned while one is in flight

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        block_size = data.draw(st.integers(1, 4))
        windows = data.draw(st.lists(KEPT, min_size=1, max_size=3))
        plain = [window for window in windows if window not in (1, "state")]
        assume(plain or 1 not in windows)  # see `PagedModel`
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
        self.in_flight: list[PlannedStep] = []
        self.running: dict[PlannedStep, Finished] = {}

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
        penalties=st.sampled_from(PENALTIES),
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
        penalties: dict[str, float],
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
                **penalties,
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

    @precondition(lambda self: len(self.in_flight) <= self.depth)
    @rule(early=st.booleans())
    def schedule(self, early: bool) -> None:
        if (planned := self.scheduler.schedule()) is not None:
            check_owners(planned)
            self.in_flight.append(planned)
            if early:
                self.run_until(planned)

    def run_until(self, planned: PlannedStep) -> Finished:
        """Steps run in their order, before their results are asked for or only then."""
        for each in self.in_flight:
            if each not in self.running:
                self.running[each] = launch(self.scheduler, self.model, each)
            if each is planned:
                break
        return self.running[planned]

    @precondition(lambda self: self.in_flight)
    @rule()
    def settle(self) -> None:
        running = self.run_until(self.in_flight[0])
        run_step(self.scheduler, self.model, self.in_flight.pop(0), self.given, running)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.in_flight) - 1))
        planned, void = self.in_flight[at], self.in_flight[at:]
        del self.in_flight[at:]
        for each in void:
            self.model.spoil(each.step)
        alive = {r for r in planned.owners.requests if r.finish_reason is None}
        ended = self.scheduler.discard(planned)
        assert alive <= {*ended} and all(r.finish_reason == "error" for r in ended)
        broken = {r.request_id for r in alive}
        assert {r.request_id for r in ended} == broken
        assert all(r.finish_reason for r in self.requests if r.request_id in broken)

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
        while self.in_flight:
            self.settle()
        finish_all(self.scheduler, self.model, self.given, self.depth)
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


class AheadMachine(SchedulerMachine):
    """The same with one step planned ahead."""

    depth = 1


class FarAheadMachine(SchedulerMachine):
    """The same with three steps in flight."""

    depth = 2


@pytest.mark.parametrize(
    ("machine", "examples"), [(SchedulerMachine, 100), (AheadMachine, 100), (FarAheadMachine, 40)]
)
def test_any_order_of_events(machine: type[SchedulerMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=40)
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


def test_a_running_state_is_not_taken_back() -> None:
    """Of a prompt that is cached as a whole, the last block is computed again: none is copied."""
    scheduler, model = build(4, ["state"], [40])
    first = add(scheduler, "first", [0, 1, 2, 0] * 2, max_tokens=4)
    finish_all(scheduler, model)
    again = add(scheduler, "again", [0, 1, 2, 0] * 2, max_tokens=4)
    finish_all(scheduler, model)
    assert again.num_cached_tokens == 4 and model.num_copies == 0
    assert again.token_ids == first.token_ids == alone(again)


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
    with pytest.raises(RequestError, match="do not fit into the KV cache"):
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
    with pytest.raises(CapacityError, match="2 requests already waiting"):
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
    scheduler.settle(step, [None])
    again = add(scheduler, "again", [0] * 8, max_tokens=1)
    finish_all(scheduler, model)
    assert again.num_cached_tokens == 0
