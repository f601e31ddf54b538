"""What comes out of the head: tokens for most, logits for whoever asks."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from infc.runtime.executors.base import head_output
from infc.runtime.requests.request import Request
from infc.runtime.sampling.draws import draws_of
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.owners import PlannedStep, StepOwners
from infc.runtime.scheduling.step import NO_TOKEN, Step
from infc.runtime.scheduling.step_builder import adjustments_of
from infc.runtime.scheduling.step_results import read_results

from .samples import sample
from .scheduling import add, build, finish_all, run_step

VALUES = st.sampled_from([-1.5, 0.0, 2.0, 2.0, np.inf, -np.inf, np.nan])


def request(params: SamplingParams | None = None) -> Request:
    """A request that has its prompt."""
    return Request("r", [1, 2, 3], params or SamplingParams())


def head_step(num_rows: int, wanted: list[int] | None, order: dict[Request, int]) -> PlannedStep:
    """A step of which only the rows matter, and who samples of which."""
    nothing = np.zeros(0, np.int32)
    draws = [request.draw(row, len(request.token_ids)) for request, row in order.items()]
    step = Step(
        token_ids=nothing,
        positions=nothing,
        query_starts=nothing,
        context_lengths=nothing,
        block_tables=(),
        slots=(),
        block_copies=(),
        logits_index=np.arange(num_rows, dtype=np.int32),
        logits_rows=None if wanted is None else np.array(wanted, np.int32),
        draws=draws_of(draws),
        adjustments=adjustments_of([*order], [draw.position for draw in draws]),
    )
    owners = StepOwners(requests=(), sampled=tuple(order), sampled_rows=tuple(order.values()))
    return PlannedStep(step, owners)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 6)), elements=VALUES),
    st.sampled_from([0.0, 1.0]),
    st.data(),
)
def test_tokens_are_what_the_sampler_gives(
    logits: Any, temperature: float, data: st.DataObject
) -> None:
    """None for a row with a NaN, or whose greatest is infinite."""
    rows = list(range(len(logits)))
    wanted = data.draw(
        st.none() | st.sets(st.sampled_from(rows)).map(sorted) if rows else st.none()
    )
    order = {request(SamplingParams(temperature=temperature, seed=r)): r for r in rows}
    step = head_step(len(rows), wanted, order).step
    given = head_output(step, logits, None)
    expected_rows = logits if wanted is None else logits[wanted]
    assert np.array_equal(given.logits, expected_rows, equal_nan=True)
    assert step.num_logits == len(given.logits)
    expected = [sample(logits[row], who).token_id for who, row in order.items()]
    assert [None if t == NO_TOKEN else t for t in given.tokens.tolist()] == expected


def test_a_temperature_that_threads_would_flush_is_none() -> None:
    (entry,) = draws_of([request(SamplingParams(temperature=5e-324)).draw(0, 3)])
    assert entry["temperature"] == sys.float_info.min


def test_each_request_finds_its_own_row() -> None:
    """Among those of prompts, of choices that share one, and of those who want no logits."""
    second = request(SamplingParams(temperature=1.0, seed=5, n=2, logprobs=2))
    order = {
        request(): 0,
        second: 1,
        second.sibling(1): 1,
        request(SamplingParams(temperature=2.0, top_p=0.9, seed=3)): 2,
        request(SamplingParams(prompt_logprobs=1, logprobs=0)): 4,
        request(SamplingParams(temperature=1.0, seed=6, presence_penalty=1.0)): 3,
        request(): 5,
    }
    logits = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    planned = head_step(6, [1, 4], order)
    results = read_results(planned, head_output(planned.step, logits, None))
    assert results.samples == [sample(logits[row], who) for who, row in order.items()]


WANTED = {
    "greedy": ({}, 0),
    "sampled": ({"temperature": 1.0}, 0),
    "choices": ({"temperature": 1.0, "n": 3}, 0),
    "greedy choices": ({"n": 2}, 0),
    "best of": ({"n": 1, "best_of": 2}, 1),
    "logprobs": ({"logprobs": 0}, 1),
    "penalty": ({"presence_penalty": 0.5}, 0),
    "prompt": ({"prompt_logprobs": 0}, 5),
}


@pytest.mark.parametrize(("params", "rows"), WANTED.values(), ids=WANTED)
def test_logits_are_asked_for_where_they_are_read(params: dict[str, Any], rows: int) -> None:
    scheduler, model = build(4, [None], [40], logit_rows=12, max_sequences=12, step_tokens=16)
    add(scheduler, "beside", [1, 2], max_tokens=2)
    add(scheduler, "r", [0, 1, 2, 2, 1, 0], max_tokens=2, **params)
    planned = run_step(scheduler, model)
    assert planned is not None
    assert planned.step.num_logits == rows
    assert len(planned.step.draws) == 1 + (params.get("best_of") or params.get("n", 1))
    assert (planned.step.adjustments is not None) == ("presence_penalty" in params)
    finish_all(scheduler, model)


def test_a_chunk_inside_a_prompt_needs_no_head() -> None:
    scheduler, model = build(4, [None], [40], step_tokens=4)
    add(scheduler, "r", [0, 1, 2, 2, 1, 0], max_tokens=1)
    heads = []
    while (step := run_step(scheduler, model)) is not None:
        heads.append(step.step.needs_head)
    assert heads == [False, True]
