"""A fault ends the request that it is of; and the engine only where nothing works any more."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cache
from types import FrameType
from typing import Any

import pytest

from infc.ir.errors import ArtifactError, InfcError
from infc.runtime import async_engine
from infc.runtime.api.llm import LLM
from infc.runtime.async_engine import AsyncEngine
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Running
from infc.runtime.requests import request_stream
from infc.runtime.requests.outputs import CompletionOutput, RequestOutput, merge_outputs
from infc.runtime.requests.pooling import Pool
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling import step_builder, step_results
from infc.runtime.scheduling.owners import PlannedStep
from infc.runtime.scheduling.scheduler import Scheduler
from infc.runtime.scheduling.step import Step
from infc.runtime.text.detokenizer import Detokenizer
from infc.runtime.text.tokenizer import Tokenizer

from .engines import make_engine
from .executors import Wrapped, owners_in_flight
from .small_artifact import make_tokenizer

Answers = dict[str, RequestOutput | BaseException]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer())


VOCAB = tokenizer().backend.get_vocab_size()
WIDTH = 4
BASE: dict[str, Any] = {"max_tokens": 9, "temperature": 1.0, "seed": 3, "ignore_eos": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"stop": ["zzz"], "logprobs": 1},
    "penalty": {"repetition_penalty": 1.5, "logit_bias": {5: 1.0}},
    "prompt": {"prompt_logprobs": 2},
    "choices": {"n": 3, "presence_penalty": 0.5},
    "best": {"n": 2, "best_of": 3},
}
PROMPTS = {name: [7 + i, 8, 9, 10, 11, 12 + i] * 2 for i, name in enumerate(CASES)}


def engine() -> Engine:
    # Blocks for half of them, so that some are preempted.
    return make_engine(VOCAB, tokenizer(), num_blocks=28, hidden_width=WIDTH)


async def collect(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return merge_outputs([output async for output in stream])


async def ask_all(served: AsyncEngine) -> Answers:
    """An answer, or what was raised, for each case, and an embedding."""
    asked = [
        collect(served.generate(PROMPTS[name], SamplingParams(**BASE, **params), name))
        for name, params in CASES.items()
    ]
    asked.append(served.read_prompt([1, 2, 3, 4, 5, 6, 7], pooling="mean"))
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
    return dict(zip([*CASES, "embedding"], answers, strict=True))


def outputs_of(answer: RequestOutput | BaseException) -> tuple[CompletionOutput, ...]:
    assert isinstance(answer, RequestOutput), answer
    return answer.outputs


@cache
def expected() -> Answers:
    """What all get where nothing fails."""
    served = AsyncEngine(engine())
    answers = asyncio.run(ask_all(served))
    served.shutdown()
    assert all(isinstance(answer, RequestOutput) for answer in answers.values())
    return answers


def failed(answer: RequestOutput | BaseException) -> bool:
    if isinstance(answer, BaseException):
        assert isinstance(answer, InfcError), repr(answer)
        return True
    assert answer.finished
    if all(part.finish_reason != "error" for part in answer.outputs):
        return False
    assert answer.error
    return True


def check(served: AsyncEngine, answers: Answers, *, best_is_whole: bool = True) -> set[str]:
    """Who did not fail got what they always get, and nothing is left behind; those who failed.

    Unless `best_is_whole`, a choice of "best" may have failed, and the best of the others be it.
    """
    ended = {name for name, answer in answers.items() if failed(answer)}
    for name in answers.keys() - ended:
        if name == "best" and not best_is_whole:
            continue
        assert outputs_of(answers[name]) == outputs_of(expected()[name]), name
    assert asyncio.run(served.drain(10)) and not served.num_pending
    served._draining = False
    assert served.healthy, served.error
    inner = served.engine
    assert not inner.has_unfinished and not inner._publisher.streams
    inner.scheduler.check()
    stats = inner.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return ended


def run(test: Callable[[AsyncEngine], Any], inner: Engine | None = None) -> set[str]:
    """Run a test, then serve everybody once more as if nothing had been; who failed in the test."""
    served = AsyncEngine(inner or engine())
    try:
        answers = asyncio.run(test(served))
        ended = check(served, answers)
        assert check(served, asyncio.run(ask_all(served))) == set()
    finally:
        served.shutdown()
    return ended


WATCHED = (
    *(f"runtime/{name}.py" for name in ("async_engine", "engine", "in_flight", "publisher")),
    *(f"runtime/text/{name}.py" for name in ("detokenizer", "text_decoders")),
    *(
        f"runtime/requests/{name}.py"
        for name in ("outputs", "pooling", "request", "request_stream", "sequence_blocks")
    ),
    *(
        f"runtime/sampling/{name}.py"
        for name in ("adjustments", "logits_adjuster", "sampler", "token_logprobs")
    ),
    *(
        f"runtime/scheduling/{name}.py"
        for name in (
            "blocks", "demand", "kv_cache", "owners", "scheduler", "step", "step_builder",
            "step_results",
        )
    ),
)  # fmt: skip


def fail_after(lines: int, hits: list[str]) -> Callable[..., Any]:
    """A trace function that has memory run out once, at a line of what is watched."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        # The loop itself, and what ends it, do nothing that can fail.
        if event == "line" and frame.f_code.co_name not in ("_run", "_die", "_fail_all"):
            lines -= 1
            if lines == 0:
                hits.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise MemoryError("injected")
        return trace

    return trace


def test_memory_runs_out_at_any_line_of_the_engines_thread() -> None:
    expected()
    point, step, count = 5, 701, 0
    while True:
        hits: list[str] = []
        threading.settrace(fail_after(point, hits))
        try:
            served = AsyncEngine(engine())
        finally:
            threading.settrace(None)
        try:
            answers = asyncio.run(ask_all(served))
            if not hits:
                assert check(served, answers) == set()
                break
            try:
                check(served, answers, best_is_whole=False)
                assert check(served, asyncio.run(ask_all(served))) == set()
            except BaseException as error:
                error.add_note(f"memory ran out at {hits}")
                raise
        finally:
            served.shutdown()
        point, count = point + step, count + 1
    assert count > 20


class Panic(BaseException):
    """As libraries written in Rust raise it."""


@pytest.mark.parametrize("error", [MemoryError("none left"), ValueError("odd"), Panic("bounds")])
@pytest.mark.parametrize("where", ["push", "flush"])
def test_a_fault_in_the_text_of_one(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    expected()
    whole = getattr(Detokenizer, where)

    def fail(self: Detokenizer, *token: int) -> str:
        if self._stops._stops and (where == "flush" or self.num_characters > 3):
            raise error
        text: str = whole(self, *token)
        return text

    async def test(served: AsyncEngine) -> Answers:
        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, where, fail)
            answers = await ask_all(served)
        answer = answers["text"]
        assert isinstance(answer, RequestOutput)
        assert answer.error == f"the output of a request failed: {type(error).__name__}"
        return answers

    assert run(test) == {"text"}


def failing_for(function: Callable[..., Any], is_meant: Callable[..., bool]) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        if is_meant(*arguments):
            raise MemoryError
        return function(*arguments)

    return fail


FAULTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "penalty": (step_builder, "adjustment_of", lambda who, _: who.request_id == "penalty"),
    "choices": (step_builder, "adjustment_of", lambda who, _: who.choice == 2),
    "prompt": (step_results, "prompt_logprobs", lambda rows, tokens, count: count == 2),
    "text": (step_results, "raw_logprobs", lambda row, token, count: count == 1),
    "best": (request_stream._Choice, "news", lambda of: of.request.request_id == "best"),
    "embedding": (Pool, "add", lambda pool, rows: True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_what_one_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected()
    owner, attribute, is_meant = FAULTS[name]

    async def test(served: AsyncEngine) -> Answers:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, failing_for(getattr(owner, attribute), is_meant))
            return await ask_all(served)

    assert run(test) == {name}


def test_of_several_choices_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, is_meant = FAULTS["choices"]
    monkeypatch.setattr(owner, attribute, failing_for(getattr(owner, attribute), is_meant))
    served = AsyncEngine(engine())
    answer = asyncio.run(ask_all(served))["choices"]
    served.shutdown()
    first, second, third = outputs_of(answer)
    assert third.finish_reason == "error"
    assert (first, second) == outputs_of(expected()["choices"])[:2]


def test_a_fault_in_who_is_told_of_steps() -> None:
    inner, told = engine(), 0

    def fail(times: Any) -> None:
        nonlocal told
        told += 1
        raise ValueError("not counted")

    inner.on_step = fail
    assert run(ask_all, inner) == set()
    assert told == inner.num_steps > 0


class FailsAt(Wrapped):
    """An executor of which some steps fail."""

    def __init__(self, engine: Engine, steps: Sequence[int], error: Exception) -> None:
        super().__init__(engine.executor)
        self.engine, self.steps, self.error, self.count = engine, steps, error, -1
        self.seen: set[str] = set()

    def launch(self, step: Step) -> Running:
        self.count += 1
        if self.count in self.steps:
            self.seen |= {request.request_id for request in owners_in_flight(self.engine).requests}
            raise self.error
        return self.inner.launch(step)


@pytest.mark.parametrize("steps", [(0,), (3,), (2, 4, 6), (1, 2)])
def test_a_step_that_fails_ends_those_who_were_in_it(steps: tuple[int, ...]) -> None:
    inner = engine()
    executor = FailsAt(inner, steps, MemoryError("none left"))
    inner.executor = executor

    async def test(served: AsyncEngine) -> Answers:
        answers = await ask_all(served)
        executor.steps = ()
        return answers

    ended = run(test, inner)
    assert ended == {name if name in CASES else "embedding" for name in executor.seen} != set()


@pytest.mark.parametrize(
    ("error", "steps"),
    [(MemoryError("gone"), 3), (ArtifactError("damaged"), 1), (RuntimeError("odd"), 1)],
)
def test_an_engine_that_only_fails_is_lost(error: Exception, steps: int) -> None:
    inner = engine()
    executor = FailsAt(inner, range(1000), error)
    inner.executor = executor

    async def test(served: AsyncEngine) -> None:
        answers = await ask_all(served)
        for _ in range(3):
            if not served.healthy:
                break
            await ask_all(served)
        assert all(isinstance(answer, InfcError) for answer in answers.values())
        assert not served.healthy and served.error is error
        assert executor.count + 1 == steps
        with pytest.raises(InfcError, match="the engine failed"):
            await collect(served.generate([1]))

    served = AsyncEngine(inner)
    asyncio.run(test(served))
    served.shutdown()


def test_nobody_loses_anything_where_a_step_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule, calls, failing = Scheduler.schedule, 0, (1, 4, 5, 9)

    def fail(self: Scheduler, **options: bool) -> PlannedStep | None:
        nonlocal calls
        calls += 1
        step = schedule(self, **options)
        if calls in failing:
            raise MemoryError
        return step

    expected()

    async def test(served: AsyncEngine) -> Answers:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "schedule", fail)
            return await ask_all(served)

    assert run(test) == set()
    assert calls > max(failing), "not all of the faults were there"


def test_an_answer_that_cannot_be_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller hears of it, and the request ends."""
    monkeypatch.setattr(async_engine, "_PATROL_SECONDS", 0.05)
    expected()

    async def test(served: AsyncEngine) -> Answers:
        loop = asyncio.get_running_loop()
        hand_over = loop.call_soon_threadsafe
        left = 1

        def fail(callback: Callable[..., object], *arguments: Any, **options: Any) -> Any:
            nonlocal left
            part = arguments[0] if arguments else None
            if isinstance(part, list) and len(part) == 1 and left:
                left -= 1
                raise MemoryError
            return hand_over(callback, *arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", fail)
        with pytest.raises(InfcError, match="could not be handed over"):
            await asyncio.wait_for(collect(served.generate([1, 2], None, "lost")), 10)
        return await ask_all(served)

    assert run(test) == set()


def test_a_thread_that_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "_PATROL_SECONDS", 0.05)
    inner = engine()
    inner.executor = FailsAt(inner, range(1000), ArtifactError("damaged"))
    served = AsyncEngine(inner)

    def fail(reason: InfcError) -> None:
        raise MemoryError

    monkeypatch.setattr(served, "_fail_all", fail)
    answers = asyncio.run(ask_all(served))
    assert all(isinstance(a, InfcError) and "damaged" in str(a) for a in answers.values())
    assert served.num_pending == 0
    served.shutdown()


def test_a_loop_that_is_closed_with_requests_open() -> None:
    served = AsyncEngine(engine())
    loop = asyncio.new_event_loop()
    stream = served.generate([1, 2, 3], SamplingParams(ignore_eos=True))
    loop.run_until_complete(anext(stream))
    loop.close()

    async def wait() -> Answers:
        while served.num_pending:
            await asyncio.sleep(0.01)
        return await ask_all(served)

    expected()
    assert check(served, asyncio.run(asyncio.wait_for(wait(), 20))) == set()
    assert loop not in served._waiting
    served.shutdown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking where there are threads
def test_a_fork_is_told_that_the_thread_stayed_behind() -> None:
    served = AsyncEngine(engine())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(InfcError, match="before this process was forked"):
                asyncio.run(asyncio.wait_for(collect(served.generate([1, 2])), 10))
            assert not served.healthy
            served.shutdown()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    expected()
    assert check(served, asyncio.run(ask_all(served))) == set()
    served.shutdown()


def test_a_text_that_fails_in_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` gives the others their answers, too."""
    llm = LLM.__new__(LLM)
    llm._closed, llm.engine, llm._parts = False, engine(), {}
    llm._ids = iter(range(10))  # type: ignore[assignment]
    params = [SamplingParams(**BASE), SamplingParams(**BASE, **CASES["text"])]
    prompts = [PROMPTS["plain"], PROMPTS["text"]]
    monkeypatch.setattr(
        Detokenizer,
        "push",
        failing_for(Detokenizer.push, lambda self, token: bool(self._stops._stops)),
    )
    good, bad = llm.generate(prompts, params)
    assert good.outputs == outputs_of(expected()["plain"])
    assert bad.outputs[0].finish_reason == "error"
    assert bad.error == "the output of a request failed: MemoryError"
    llm.close()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What is injected is logged; here nobody reads it."""
    with caplog.at_level("CRITICAL", "infc.runtime"):
        yield
