"""What an engine tells of its steps: what each held, and where its time went."""

from __future__ import annotations

import time
from itertools import pairwise

from infc.runtime.engine import Engine
from infc.runtime.executors.base import Running
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.owners import StepTimes
from infc.runtime.scheduling.step import Step

from .executors import Wrapped
from .test_async_engine import make_engine

PROMPTS = ([1, 2, 3], [4, 5], [6] * 20)


def run(engine: Engine) -> list[StepTimes]:
    """Three prompts to their ends."""
    told: list[StepTimes] = []
    engine.on_step = told.append
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    tokens: dict[str, list[float]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.metrics.last_token_time is not None
            tokens.setdefault(output.request_id, []).append(output.metrics.last_token_time)
    assert all(times == sorted(set(times)) and len(times) == 4 for times in tokens.values())
    gaps = [gap for times in told for gap, count in times.token_gaps.items() for _ in range(count)]
    given = [after - before for times in tokens.values() for before, after in pairwise(times)]
    assert sorted(gaps) == sorted(given)
    engine.step()  # nothing left to do, and nothing to tell of
    return told


def test_steps_add_up_to_the_tokens_of_the_requests() -> None:
    engine = make_engine()
    told = run(engine)
    assert len(told) == engine.num_steps
    assert sum(times.num_sampled for times in told) == 12
    # Each token but the last of a request is computed once.
    assert sum(times.num_tokens for times in told) == sum(map(len, PROMPTS)) + 12 - 3
    assert max(times.num_sequences for times in told) == 3


def test_time_in_the_executor_is_told_apart() -> None:
    engine = make_engine()

    class Slow(Wrapped):
        def launch(self, step: Step) -> Running:
            time.sleep(0.01)
            return self.inner.launch(step)

    engine.executor = Slow(engine.executor)
    for times in run(engine):
        assert 0.01 <= times.executor_seconds < times.seconds
