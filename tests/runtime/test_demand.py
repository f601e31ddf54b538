"""Admission keeps room for what answers are expected to need; nobody starves for it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.runtime.requests.request import Request
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling import demand
from infc.runtime.scheduling.demand import AnswerLengths
from infc.runtime.scheduling.scheduler import Scheduler

from .scheduling import add, add_choices, alone, build, finish_all, run_step

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths, st.integers(0, 60), st.integers(1, 60))
def test_answers_get_as_many_as_longer_ones_got(ended: list[int], tokens: int, most: int) -> None:
    known = AnswerLengths()
    assert known.expected_more(tokens, most) == 0, "nothing is known"
    for length in ended:
        known.add(length)
    longer = [length for length in ended if length > tokens]
    mean = sum(longer) // len(longer) - tokens if longer else tokens
    assert known.expected_more(tokens, most) == min(most, max(1, mean))


def test_only_the_latest_answers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "_MEMORY", 3)
    known = AnswerLengths()
    for length in (500, 10, 10, 30, 500, 20, 20, 20):
        known.add(length)
    assert known.expected_more(0, 1000) == 20


SHARE = demand._SHARE_OF_PEAK


def serve(seed: int) -> Counter[str]:
    """Requests over a small pool, of which half write as much as they may."""
    limits = {"step_tokens": 64, "max_sequences": 16, "logit_rows": 16, "max_context": 200}
    scheduler, _ = build(4, [None], [100], **limits)
    draw = random.Random(seed)
    ends = {str(i): draw.choice([4, 100]) for i in range(100)}
    for name in ends:
        prompt = [draw.randrange(1000) for _ in range(draw.randrange(8, 40))]
        scheduler.add(Request(name, prompt, SamplingParams(max_tokens=100, stop_token_ids=[1])))
    return play(scheduler, ends)


def play(scheduler: Scheduler, ends: dict[str, int]) -> Counter[str]:
    """Tokens, steps and preemptions until all have ended, each after its number of tokens."""
    counts: Counter[str] = Counter()
    while (planned := scheduler.schedule()) is not None:
        counts["tokens"] += planned.step.num_tokens
        counts["steps"] += 1
        ending = [r.num_output_tokens + 1 >= ends[r.request_id] for r in planned.owners.sampled]
        scheduler.settle(planned, [[1 if last else 2] for last in ending])
        scheduler.check()
    counts["preemptions"] = scheduler.num_preemptions
    return counts


def test_preemptions_fall_and_throughput_hardly_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps that take 16 ms whatever they hold, and 1 ms a token."""
    careful, careless = [], []
    for seed in range(3):
        monkeypatch.setattr(demand, "_SHARE_OF_PEAK", SHARE)
        careful.append(serve(seed))
        monkeypatch.setattr(demand, "_SHARE_OF_PEAK", 0.0)
        careless.append(serve(seed))
    for what, share in (("preemptions", 0.6), ("tokens", 0.93)):
        assert sum(c[what] for c in careful) <= share * sum(c[what] for c in careless), what
    seconds = [sum(c["steps"] * 16 + c["tokens"] for c in runs) for runs in (careful, careless)]
    assert seconds[0] <= 1.02 * seconds[1]


def test_prompts_that_are_only_read_are_no_answers() -> None:
    """Embeddings and scores end with no token at all, however long the next answer will be."""
    scheduler, model = build(4, [None], [100], max_context=60)
    for index in range(5):
        add(scheduler, f"answer {index}", [0, 1, 2], max_tokens=30)
    finish_all(scheduler, model)
    lengths = scheduler._demand._lengths
    assert lengths.expected_more(0, 100) == 30
    for index in range(300):
        add(scheduler, f"read {index}", [0, 1, 2], max_tokens=0, prompt_logprobs=0)
    finish_all(scheduler, model)
    assert lengths.expected_more(0, 100) == 30


def test_sequences_with_a_block_for_a_whole_context_run_all_at_once() -> None:
    """None of them ever needs another, so that no block is kept free for them."""
    scheduler, model = build(48, [None, 5], [5, 5], max_context=40)
    for index in range(6):
        add(scheduler, f"r{index}", [0, 1], max_tokens=20)
    planned = run_step(scheduler, model)
    assert planned is not None and planned.step.num_sequences == 4
    finish_all(scheduler, model)
    assert scheduler.num_preemptions == 0


def test_choices_that_copy_a_block_for_a_whole_context_find_one() -> None:
    """Beside a sequence that would have taken the last."""
    scheduler, model = build(48, [None], [6], max_sequences=5, logit_rows=5)
    choices = add_choices(scheduler, "r", [0, 1, 2], max_tokens=8, n=3, temperature=1.0, seed=2)
    others = [add(scheduler, f"r{index}", [0, 1], max_tokens=20) for index in range(2)]
    planned = run_step(scheduler, model)
    assert planned is not None and planned.step.num_sequences == 2
    run_step(scheduler, model)
    assert scheduler.num_preemptions == 0
    run_step(scheduler, model)
    assert scheduler.num_running == 5
    finish_all(scheduler, model)
    assert scheduler.num_preemptions == 0
    for request in (*choices, *others):
        assert request.token_ids == alone(request)


def test_blocks_for_a_whole_context_stay_close_together() -> None:
    """After many ran at once, few that run have the lowest blocks."""
    scheduler, model = build(48, [None, 5], [9, 9], step_tokens=16, max_sequences=8, logit_rows=8)
    for index in range(8):
        add(scheduler, f"many {index}", [0, 1], max_tokens=3 + 5 * index % 7)
    finish_all(scheduler, model)
    for index in range(2):
        add(scheduler, f"few {index}", [0, 1], max_tokens=4)
    planned = run_step(scheduler, model)
    assert planned is not None
    assert [table[:, 0].tolist() for table in planned.step.block_tables] == [[1, 2], [1, 2]]
