"""A step that is derived from the last is the one that would be built anew."""

from __future__ import annotations

import numpy as np
import pytest

from infc.runtime.scheduling.step import Step
from infc.runtime.scheduling.step_builder import StepBuilder

from .scheduling import add, alone, build, finish_all

ARRAYS = ("token_ids", "positions", "query_starts", "context_lengths", "logits_index", "draws")
TUPLES = ("requests", "sampled", "sampled_rows", "prompt_rows")


def assert_equal(step: Step, fresh: Step) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(step, name), getattr(fresh, name)), name
    for groups in ("block_tables", "slots"):
        for ours, theirs in zip(getattr(step, groups), getattr(fresh, groups), strict=True):
            assert np.array_equal(ours, theirs), groups
    assert all(getattr(step, name) == getattr(fresh, name) for name in TUPLES)
    assert len(step.tokens) == len(step.draws)
    assert step.num_logits == fresh.num_logits


def test_a_derived_step_is_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside arrivals, ends, preemptions, choices and windows that move on."""
    derive, num_derived = StepBuilder._next, 0

    def checked(builder: StepBuilder, last: Step) -> Step:
        nonlocal num_derived
        num_derived += 1
        step = derive(builder, last)
        fresh = builder._fresh([(request, 1) for request in step.requests], step.requests)
        assert_equal(step, fresh)
        assert step.tokens is not last.tokens
        return step

    monkeypatch.setattr(StepBuilder, "_next", checked)
    scheduler, model = build(2, [None, 5], [26, 26], max_context=40)
    requests = [
        add(scheduler, "greedy", [0, 1, 2] * 3, max_tokens=20),
        add(scheduler, "sampled", [1, 1, 2], max_tokens=15, temperature=1.0, seed=1),
        add(scheduler, "choices", [1, 0, 2], max_tokens=9, temperature=1.0, seed=1, n=2),
        add(scheduler, "scored", [2, 0, 2], max_tokens=5, prompt_logprobs=1),
        add(scheduler, "late", [2, 2], max_tokens=25),
    ]
    finish_all(scheduler, model)
    assert num_derived > 20
    assert scheduler.num_preemptions > 0
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]
