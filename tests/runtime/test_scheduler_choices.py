"""Several choices of one request: one prompt, slots, preemption, ends."""

from __future__ import annotations

import pytest

from infc.ir.errors import CapacityError
from infc.runtime.requests.request import RequestState

from .scheduling import (
    add,
    add_choices,
    alone,
    build,
    finish_all,
    run_step,
)


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
    finish_all(scheduler, model)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("n", [3, 12])
def test_choices_begin_as_soon_as_there_is_a_seat(n: int) -> None:
    """Nobody waits for so many batch slots at once: not they, and not who comes after them."""
    scheduler, model = build(4, [None], [80], max_sequences=3, max_context=100)
    first = add(scheduler, "first", [0, 1], max_tokens=90)
    run_step(scheduler, model)
    choices = add_choices(scheduler, "many", [1, 2] * 3, max_tokens=4, n=n, temperature=1.0, seed=5)
    late = add(scheduler, "late", [2], max_tokens=3)
    run_step(scheduler, model)
    states = [choice.state for choice in choices]
    assert states == [RequestState.RUNNING] * 2 + [RequestState.WAITING] * (n - 2)
    for _ in range(70):
        run_step(scheduler, model)
    assert first.state is RequestState.RUNNING
    assert late.state is RequestState.FINISHED
    finish_all(scheduler, model)
    assert scheduler.num_preemptions == 0
    assert [choice.token_ids for choice in choices] == [alone(choice) for choice in choices]


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


def test_choices_that_wait_are_not_requests_of_the_queue() -> None:
    scheduler, model = build(4, [None], [80], max_sequences=3, max_context=100, max_waiting=2)
    add(scheduler, "first", [0, 1], max_tokens=90)
    run_step(scheduler, model)
    add_choices(scheduler, "many", [1, 2] * 3, max_tokens=4, n=12, temperature=1.0, seed=5)
    run_step(scheduler, model)
    assert scheduler.num_waiting == 10
    add(scheduler, "late", [2], max_tokens=3)
    add(scheduler, "later", [2], max_tokens=3)
    with pytest.raises(CapacityError, match="2 requests already waiting"):
        add(scheduler, "last", [2], max_tokens=3)
    finish_all(scheduler, model)


def test_a_prompt_is_computed_once_however_few_seats_there_are() -> None:
    """Also over several steps, and with no reuse: then its choices wait for slots together."""
    prompt = [1, 2] * 20
    for reuse in (True, False):
        scheduler, model = build(4, [None], [80], max_sequences=4, max_context=60, step_tokens=12)
        scheduler.kv.prefix_reuse = reuse
        add(scheduler, "first", [0, 1], max_tokens=12)
        add(scheduler, "second", [0, 2], max_tokens=30)
        run_step(scheduler, model)
        choices = add_choices(scheduler, "many", prompt, max_tokens=2, n=3, temperature=1.0, seed=5)
        before = model.num_tokens
        finish_all(scheduler, model)
        assert [choice.token_ids for choice in choices] == [alone(choice) for choice in choices]
        # The last block of a prompt is not reused, and each sequence computes its own tokens.
        assert model.num_tokens - before < 2 * len(prompt) + 40
