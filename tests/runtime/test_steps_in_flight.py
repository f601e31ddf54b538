"""An engine whose executor takes a step while another runs: nobody notices, and nobody is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from infc.ir.errors import InfcError
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Finished
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling import demand
from infc.runtime.scheduling.owners import PlannedStep
from infc.runtime.scheduling.step import Step, StepOutput

from .engines import make_engine
from .executors import Course, LateExecutor, MaskedLateExecutor
from .samples import Grammar

VOCAB = 40
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]

# Of each kind that is planned in a way of its own; the prompts share a beginning.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 12},
    "sampled": {"max_tokens": 9, "temperature": 1.0, "seed": 3},
    "one token": {"max_tokens": 1},
    "choices": {"max_tokens": 6, "temperature": 1.0, "seed": 4, "n": 3},
    "best": {"max_tokens": 4, "temperature": 1.0, "seed": 4, "n": 1, "best_of": 3},
    "penalty": {"max_tokens": 8, "repetition_penalty": 1.5},
    "counted": {"max_tokens": 9, "frequency_penalty": 1.5, "presence_penalty": 0.5, "n": 2},
    "biased": {"max_tokens": 7, "logit_bias": {3: 2.0, 7: -9.0}, "min_tokens": 3},
    "grammar": {"max_tokens": 8, "temperature": 1.0, "seed": 5},
    "grammars": {"max_tokens": 6, "temperature": 1.0, "n": 2, "repetition_penalty": 1.2},
    "listed": {"max_tokens": 7, "allowed_token_ids": list(range(0, VOCAB, 3)), "logprobs": 1},
    "scored": {"max_tokens": 5, "prompt_logprobs": 2, "logprobs": 1},
    "stops": {"max_tokens": 20, "stop_token_ids": list(range(0, VOCAB, 5))},
    "whole context": {},
    "long": {"max_tokens": 45},
    "longer": {"max_tokens": 46},
}


def ask_all(engine: Engine) -> None:
    for index, (name, params) in enumerate(KINDS.items()):
        chosen = SamplingParams(**{"ignore_eos": True, "seed": index, **params})
        constraint = Grammar(VOCAB, name == "grammar") if name.startswith("grammar") else None
        prompt = [*PROMPT[: 3 + index % 7], index]
        engine.add_request(name, prompt, chosen, constraint=constraint)
    engine.read_prompt("mean", [*PROMPT, 11], pooling="mean")
    engine.read_prompt("last", [*PROMPT, 12], pooling="last")


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Step to the end; every answer, and nothing is left behind."""
    parts: dict[str, list[RequestOutput]] = {}
    for _ in range(3000):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            parts.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    return {name: merge_outputs(outputs) for name, outputs in parts.items()}


def told(answer: RequestOutput) -> tuple[Any, ...]:
    """What an answer says, but for its times."""
    vector = None if answer.embedding is None else answer.embedding.tolist()
    return answer.outputs, answer.prompt_logprobs, answer.error, vector


def mixed_engine(**options: Any) -> Engine:
    return make_engine(VOCAB, hidden_width=3, step_tokens=12, **options)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("courses", [["late"], ["early"], ["early", "late", "late"]])
@pytest.mark.parametrize("num_blocks", [80, 20])
@pytest.mark.parametrize("kind", [LateExecutor, MaskedLateExecutor])
def test_answers_do_not_depend_on_when_they_come(
    depth: int,
    courses: Sequence[Course],
    num_blocks: int,
    kind: type[LateExecutor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demand, "_SHARE_OF_PEAK", 0.0)  # so that some are preempted
    plain = mixed_engine(num_blocks=num_blocks)
    ask_all(plain)
    expected = finish(plain)
    engine = mixed_engine(num_blocks=num_blocks)
    executor = engine.executor = kind(engine.executor, depth, cycle(courses).__next__)
    ask_all(engine)
    answers = finish(engine)
    assert not isinstance(executor, MaskedLateExecutor) or executor.num_late
    assert {name: told(a) for name, a in answers.items()} == {
        name: told(a) for name, a in expected.items()
    }
    assert (engine.stats().num_preemptions > 0) == (num_blocks == 20)


def test_a_step_is_told_while_the_next_one_runs() -> None:
    engine = make_engine(VOCAB)
    executor = engine.executor = LateExecutor(engine.executor)
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    assert engine.step() == []
    tokens = 0
    while tokens < 7:
        (output,) = engine.step()
        tokens += len(output.outputs[0].token_ids)
        assert executor.num_launched == tokens + 1
        assert len(executor.queue) == 1, "nothing runs"
    (output,) = engine.step()
    assert output.finished and executor.num_launched == 8, "the last token was computed"
    assert not engine.has_unfinished


class Asked(Grammar):
    """Notes how long the outputs were that it was asked about, and fails at one."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__(VOCAB)
        self.fails_at, self.lengths = fails_at, list[int]()

    def mask(self, output_ids: Sequence[int]) -> Any:
        self.lengths.append(len(output_ids))
        if len(output_ids) == self.fails_at:
            raise KeyError("state")
        return super().mask(output_ids)


@pytest.mark.parametrize("kind", [LateExecutor, MaskedLateExecutor])
def test_a_constraint_is_one_step_ahead_where_its_mask_may_come_late(
    kind: type[LateExecutor],
) -> None:
    engine = make_engine(VOCAB)
    executor = engine.executor = kind(engine.executor)
    constraint = Asked()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add_request("r", PROMPT, params, constraint=constraint)
    assert len(finish(engine)["r"].outputs[0].token_ids) == 8
    assert constraint.lengths == list(range(8))
    assert (executor.num_launched, getattr(executor, "num_late", 0)) == (
        (8, 7) if kind is MaskedLateExecutor else (8, 0)
    )


def test_a_constraint_that_fails_late_ends_its_own_request() -> None:
    engine = make_engine(VOCAB)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add_request("r", PROMPT, params)
    expected = finish(engine)["r"]
    executor = engine.executor = MaskedLateExecutor(engine.executor)
    engine.add_request("r", PROMPT, params)
    engine.add_request("faulty", PROMPT, params, constraint=Asked(fails_at=3))
    answers = finish(engine)
    assert executor.num_late >= 3
    assert answers["r"].outputs == expected.outputs
    assert answers["faulty"].outputs[0].finish_reason == "error"
    assert len(answers["faulty"].outputs[0].token_ids) == 3
    assert answers["faulty"].error == "the constraint Asked failed: KeyError: 'state'"


@pytest.mark.parametrize("how", ["abort", "close", "give up"])
def test_a_step_whose_masks_nobody_wants_does_not_wait_for_them(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(VOCAB)
    executor = engine.executor = MaskedLateExecutor(engine.executor)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add_request("r", PROMPT, params, constraint=Asked())
    assert engine.step() == []
    assert engine._launch_next() and executor.awaits_masks
    if how == "abort":
        engine.abort("r")
        while engine.has_unfinished:
            assert engine.step() == []
    elif how == "close":
        engine.close()
    else:
        monkeypatch.setattr(engine.scheduler, "settle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert not executor.awaits_masks


def test_closing_waits_for_what_is_in_flight() -> None:
    engine = make_engine(VOCAB)
    executor = engine.executor = LateExecutor(engine.executor)
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    assert engine.step() == [] and len(executor.queue) == 1
    engine.close()
    assert not executor.queue and not engine.has_unfinished
    assert engine.step() == []


def test_the_row_behind_an_end_is_dropped_and_its_name_is_free() -> None:
    engine = make_engine(VOCAB)
    engine.add_request("alone", PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    whole = finish(engine)["alone"].outputs[0].token_ids
    stop = whole[4]
    executor = engine.executor = LateExecutor(engine.executor)
    params = SamplingParams(max_tokens=30, stop_token_ids=[stop], ignore_eos=True)
    engine.add_request("r", PROMPT, params)
    outputs: list[RequestOutput] = []
    while not (outputs and outputs[-1].finished):
        outputs += engine.step()
    assert merge_outputs(outputs).outputs[0].token_ids == whole[: whole.index(stop) + 1]
    assert len(executor.queue) == 1 and engine.has_unfinished
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))
    assert finish(engine)["r"].outputs[0].token_ids == whole[:6]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("failing", ["fails", "refused"])
def test_a_step_that_fails_ends_its_requests_and_those_behind_begin_again(
    depth: int, failing: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = mixed_engine()
    ask_all(plain)
    expected = {name: told(answer) for name, answer in finish(plain).items()}
    for seed in range(20):
        draw = random.Random(seed)
        courses: list[Course] = ["early", "late"] * 8
        courses.append(failing)
        engine = mixed_engine()
        kind = (LateExecutor, MaskedLateExecutor)[seed % 2]
        engine.executor = kind(engine.executor, depth, partial(draw.choice, courses))
        ended: set[str] = set()
        discard = engine.scheduler.discard

        def noted(planned: PlannedStep, ended: Any = ended, discard: Any = discard) -> Any:
            given = discard(planned)
            ended |= {request.request_id for request in given}
            return given

        monkeypatch.setattr(engine.scheduler, "discard", noted)
        ask_all(engine)
        parts: dict[str, list[RequestOutput]] = {}
        while engine.has_unfinished:
            with suppress(InfcError):
                for output in engine.step():
                    parts.setdefault(output.request_id, []).append(output)
            engine.scheduler.check()
        stats = engine.stats()
        assert stats.num_free_blocks == stats.num_blocks
        whole = {name: merge_outputs(outputs) for name, outputs in parts.items()}
        finished = {name: told(answer) for name, answer in whole.items() if answer.finished}
        assert ended
        assert finished.keys() == expected.keys() - ended
        assert all(answer == expected[name] for name, answer in finished.items())


def test_requests_outlive_a_step_that_cannot_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixed_engine()
    ask_all(plain)
    expected = {name: told(answer) for name, answer in finish(plain).items()}
    for step in range(1, 12, 2):
        engine = mixed_engine()
        engine.executor = LateExecutor(engine.executor)
        ask_all(engine)
        parts = [output for _ in range(step) for output in engine.step()]
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "_admit", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        parts += finish(engine).values()
        by_name: dict[str, list[RequestOutput]] = {}
        for part in parts:
            by_name.setdefault(part.request_id, []).append(part)
        answers = {name: told(merge_outputs(each)) for name, each in by_name.items()}
        assert answers == expected


class Successors:
    """An executor whose next token follows from the last one and its position; it keeps nothing."""

    depth = 0

    def __init__(self) -> None:
        self._drawn = np.zeros(0, np.int32)

    def launch(self, step: Step) -> Finished:
        ids = step.token_ids.copy()
        ids[step.carried[:, 0]] = self._drawn[step.carried[:, 1]]
        at = step.logits_index[step.draws["row"]]
        tokens = successor(ids[at], step.positions[at], step.draws["choice"]).astype(np.int32)
        self._drawn = tokens
        return Finished(StepOutput(tokens, np.zeros((0, VOCAB), np.float32)))

    def close(self) -> None: ...


def successor(token: Any, position: Any, choice: Any) -> Any:
    return (31 * token + 17 * position + 7 * choice + 5) % VOCAB


def answer_of(prompt: list[int], choice: int, max_tokens: int, stop: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(int(successor(tokens[-1], len(tokens) - 1, choice)))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


class Schedule:
    """A few requests that come and are cancelled at random moments, on few blocks and slots."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.engine = make_engine(
            VOCAB,
            num_blocks=draw.choice([8, 20]),
            step_tokens=draw.choice([3, 8]),
            max_sequences=3,
            max_context=24,
        )
        self.engine.executor = Successors()
        if seed % 4:
            courses: list[Course] = ["early", "late"]
            self.engine.executor = LateExecutor(Successors(), 1, partial(draw.choice, courses))
        self.asked: dict[str, tuple[list[int], int, int]] = {}
        self.parts: dict[str, list[RequestOutput]] = {}

    def run(self) -> None:
        to_come = self.draw.randint(1, 4)
        while to_come or self.engine.has_unfinished:
            if to_come and self.draw.random() < 0.4:
                self.ask(f"r{to_come}")
                to_come -= 1
            if self.asked and self.draw.random() < 0.1:
                ended = self.engine.abort(self.draw.choice([*self.asked]))
                self.take([] if ended is None else [ended])
            self.take(self.engine.step())

    def ask(self, name: str) -> None:
        draw = self.draw
        prompt = [1, 2, 3, 4, 5, 6, draw.randrange(VOCAB)][-draw.randint(1, 7) :]
        max_tokens, stop = draw.randint(1, 9), draw.randrange(VOCAB)
        n = draw.choice([1, 1, 2])
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[stop], n=n)
        self.engine.add_request(name, prompt, params, draw.randint(0, 1))
        self.asked[name] = prompt, max_tokens, stop

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.parts.setdefault(output.request_id, []).append(output)

    def check(self) -> None:
        assert self.parts.keys() == self.asked.keys()
        for name, outputs in self.parts.items():
            assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
            prompt, max_tokens, stop = self.asked[name]
            for completion in merge_outputs(outputs).outputs:
                whole = answer_of(prompt, completion.index, max_tokens, stop)
                given = [*completion.token_ids]
                aborted = completion.finish_reason == "abort"
                assert given == (whole[: len(given)] if aborted else whole)
        self.engine.scheduler.check()
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks


def test_no_request_is_lost_in_any_of_many_schedules() -> None:
    for seed in range(2000):
        schedule = Schedule(seed)
        schedule.run()
        schedule.check()
