"""A step that is derived from the last is the one that would be built anew."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from infc.runtime.sampling.adjustments import Adjustments
from infc.runtime.scheduling.owners import PlannedStep
from infc.runtime.scheduling.step_builder import StepBuilder

from .scheduling import add, alone, build, finish_all

ARRAYS = (
    *("token_ids", "positions", "query_starts", "context_lengths", "logits_index", "draws"),
    "carried",
)
TUPLES = ("requests", "sampled", "sampled_rows", "prompt_rows")


def assert_equal(planned: PlannedStep, anew: PlannedStep) -> None:
    step, fresh = planned.step, anew.step
    for name in ARRAYS:
        assert np.array_equal(getattr(step, name), getattr(fresh, name)), name
    for groups in ("block_tables", "slots"):
        for ours, theirs in zip(getattr(step, groups), getattr(fresh, groups), strict=True):
            assert np.array_equal(ours, theirs), groups
    assert all(getattr(planned.owners, n) == getattr(anew.owners, n) for n in TUPLES)
    assert step.wants_hidden == fresh.wants_hidden
    assert step.num_logits == fresh.num_logits
    if step.adjustments is None or fresh.adjustments is None:
        assert step.adjustments is fresh.adjustments
        return
    for field in fields(Adjustments):
        ours, theirs = (getattr(each.adjustments, field.name) for each in (step, fresh))
        assert np.array_equal(ours, theirs), field.name


@pytest.mark.parametrize("depth", [0, 1])
def test_a_derived_step_is_a_fresh_one(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside arrivals, ends, preemptions, choices and windows that move on."""
    derive, num_derived = StepBuilder._next, 0

    def checked(builder: StepBuilder, last: PlannedStep) -> PlannedStep:
        nonlocal num_derived
        num_derived += 1
        planned = derive(builder, last)
        requests = planned.owners.requests
        assert_equal(planned, builder._fresh([(request, 1) for request in requests], requests))
        return planned

    monkeypatch.setattr(StepBuilder, "_next", checked)
    scheduler, model = build(2, [None, 5], [20, 20], max_context=40)
    requests = [
        add(scheduler, "greedy", [0, 1, 2] * 3, max_tokens=20),
        add(scheduler, "sampled", [1, 1, 2], max_tokens=15, temperature=1.0, seed=1),
        add(scheduler, "choices", [1, 0, 2], max_tokens=9, temperature=1.0, seed=1, n=2),
        add(scheduler, "scored", [2, 0, 2], max_tokens=5, prompt_logprobs=1),
        add(scheduler, "late", [2, 2], max_tokens=25),
        add(scheduler, "repeated", [1, 2], max_tokens=12, repetition_penalty=1.4),
        add(scheduler, "biased", [2, 2], max_tokens=9, min_tokens=4, stop_token_ids=[0]),
        add(scheduler, "allowed", [2, 1], max_tokens=9, allowed_token_ids=[0, 2]),
    ]
    finish_all(scheduler, model, depth=depth)
    assert num_derived > 20
    assert scheduler.num_preemptions > 0
    assert [r.token_ids for r in requests] == [alone(r) for r in requests]
