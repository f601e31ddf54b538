"""Rows of prompts that log-probabilities are asked of, and prompts that are only read."""

from __future__ import annotations

import pytest

from .scheduling import (
    PromptEntries,
    add,
    alone,
    build,
    finish_all,
    prompt_alone,
    run_step,
)


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
        assert step is not None and len(step.step.logits_index) <= 5
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
