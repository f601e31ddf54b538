"""Faults at every line: a request is queued or not, and an answer is whole or has failed."""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from infc.ir.errors import RequestError
from infc.runtime.engine import Engine
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.requests.resumption import ChoiceProgress, Resumption
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling import scheduler as scheduler_module

from .engines import make_engine
from .scheduling import add, build, finish_all

VOCAB = 50
WATCHED = ("runtime/engine.py", "runtime/publisher.py", "runtime/scheduling/scheduler.py")


def fails_at(line: int, call: Callable[[], object], within: str | None = None) -> bool:
    """Whether memory ran out at the line of that number, counted from 1, of those that run.

    Of these, with `within`, only lines of functions of that name.
    """
    left, before = line, sys.gettrace()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        if event == "line" and within in (None, frame.f_code.co_name):
            left -= 1
            if left == 0:
                raise MemoryError("injected")
        return trace

    sys.settrace(trace)
    try:
        call()
    except MemoryError:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_scheduler_queues_all_of_a_request_or_nothing() -> None:
    line = 1
    while True:
        scheduler, model = build(4, [None], [20])
        add(scheduler, "first", [1, 2, 0], max_tokens=3)
        failed = fails_at(line, partial(add, scheduler, "r", [1, 2], max_tokens=3, n=3))
        scheduler.check()
        assert (scheduler.get("r") is None, scheduler.num_waiting) == (failed, 1 if failed else 2)
        if not failed:
            break
        add(scheduler, "r", [1, 2], max_tokens=3, n=3)
        finish_all(scheduler, model)
        line += 1
    assert line > 10


def test_a_request_that_was_queued_already_as_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, _ = build(4, [None], [20])

    def insert_and_fail(*arguments: Any, **options: Any) -> None:
        insort(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduler_module, "insort", insert_and_fail)
        with pytest.raises(KeyboardInterrupt):
            add(scheduler, "r", [1, 2])
    scheduler.check()
    assert not scheduler.has_unfinished and scheduler.num_waiting == 0


TOLD = ChoiceProgress(token_ids=(1,)), ChoiceProgress(token_ids=(2, 3))


@pytest.mark.parametrize("resumed", [None, Resumption(seed=1, choices=TOLD)])
def test_an_engine_takes_all_of_a_request_or_nothing(resumed: Resumption | None) -> None:
    params, line = SamplingParams(max_tokens=3, n=2), 1
    while True:
        engine = make_engine(VOCAB)
        prepared = engine.prepare("r", [1, 2], params, resumed=resumed)
        failed = fails_at(line, partial(engine.submit, prepared))
        engine.scheduler.check()
        assert engine.knows("r") is engine.has_unfinished is not failed
        if not failed:
            break
        engine.add_request("r", [1, 2], params)
        parts = []
        while engine.has_unfinished:
            parts += engine.step()
        assert merge_outputs(parts).finished
        line += 1
    assert line > 10


def test_a_request_of_a_name_in_use_leaves_the_other_alone() -> None:
    engine = make_engine(VOCAB)
    prepared = engine.prepare("r", [1, 2], SamplingParams(max_tokens=3))
    engine.submit(prepared)
    for again in (prepared, engine.prepare("r", [3])):
        with pytest.raises(RequestError, match="already in use"):
            engine.submit(again)
    assert engine.knows("r")
    parts = []
    while engine.has_unfinished:
        parts += engine.step()
    assert merge_outputs(parts).outputs[0].finish_reason == "length"


def test_a_step_that_fails_leaves_no_part_of_an_answer_out() -> None:
    """Its caller gets what it gave, or the requests are given up."""
    params, line, given_up = SamplingParams(max_tokens=5, temperature=1.0, seed=3), 1, 0
    whole: tuple[int, ...] = ()
    while True:
        engine, parts = make_engine(VOCAB), list[RequestOutput]()
        engine.add_request("r", [1, 2, 3], params)

        def run(engine: Engine = engine, parts: list[RequestOutput] = parts) -> None:
            while engine.has_unfinished:
                parts += engine.step()

        failed = fails_at(line, run, within="step")
        run()
        engine.scheduler.check()
        if parts and parts[-1].finished:
            answer = merge_outputs(parts).outputs[0].token_ids
            assert answer == (whole or answer) and len(answer) == 5
            whole = answer
        else:
            given_up += 1
            assert not engine.knows("r")
        if not failed:
            break
        line += 1
    assert line > 30 and given_up > 0
