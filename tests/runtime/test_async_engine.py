"""AsyncEngine: many streams over one engine, cancelled at any moment; and when its thread dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from infc.ir.errors import CapacityError, DrainingError, InfcError, RequestError
from infc.runtime.async_engine import AsyncEngine
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Running
from infc.runtime.limits import RuntimePlan
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.scheduling.step import Step

from .executors import Wrapped
from .paged_model import PagedModel, make_group

VOCAB = 50


def make_engine(max_waiting: int = 100) -> Engine:
    groups = (make_group("full", 4, None), make_group("window", 4, 9))
    plan = RuntimePlan(
        limits=SchedulerLimits(
            step_tokens=16,
            max_sequences=8,
            logit_rows=8,
            max_context=64,
            max_waiting=max_waiting,
        ),
        groups=groups,
        num_blocks=(60, 60),
        num_threads=1,
        pin=False,
        weights="loaded",
        prefix_reuse=True,
    )
    return Engine(PagedModel(groups, plan.num_blocks, VOCAB), plan, vocab_size=VOCAB)


def run(test: Callable[[AsyncEngine], Awaitable[None]], engine: Engine | None = None) -> None:
    """Run a test in a loop; afterwards every block is free again."""
    served = AsyncEngine(engine or make_engine())

    async def guarded() -> None:
        await asyncio.wait_for(test(served), 30)

    try:
        asyncio.run(guarded())
    finally:
        served.shutdown()
    assert served.num_pending == 0
    assert not served.engine.has_unfinished
    stats = served.engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    served.engine.scheduler.check()


async def collect(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return merge_outputs([output async for output in stream])


def alone(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    engine = make_engine()
    engine.add_request("r", prompt, params)
    parts = []
    while engine.has_unfinished:
        parts += engine.step()
    return merge_outputs(parts).outputs[0].token_ids


def test_many_streams_each_get_what_they_get_alone() -> None:
    cases = [
        ([i % 5, 1, 2] * (1 + i % 4), SamplingParams(max_tokens=5 + i, temperature=i % 2, seed=i))
        for i in range(40)
    ]

    async def test(served: AsyncEngine) -> None:
        answers = await asyncio.gather(*(collect(served.generate(*case)) for case in cases))
        for case, answer in zip(cases, answers, strict=True):
            assert answer.outputs[0].token_ids == alone(*case)

    engine = make_engine()
    run(test, engine)
    assert engine.scheduler.kv.pools[0].num_cached > 0


def test_cancelled_and_closed_streams_give_everything_back() -> None:
    async def test(served: AsyncEngine) -> None:
        tasks = [asyncio.ensure_future(collect(served.generate([i, 2, 3]))) for i in range(30)]
        await asyncio.sleep(0.02)
        for task in tasks[::2]:
            task.cancel()
        async with aclosing(served.generate([1, 2])) as stream:
            async for output in stream:
                assert output.outputs[0].token_ids
                break
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, RequestOutput) for r in results[1::2])
        assert await served.drain(10)

    run(test)


def test_abort_by_name_ends_the_stream() -> None:
    async def test(served: AsyncEngine) -> None:
        outputs = []
        async for output in served.generate([1, 2], None, "mine"):
            outputs.append(output)
            served.abort("mine")
        assert outputs[-1].outputs[0].finish_reason in ("abort", "length")
        served.abort("mine")
        served.abort("nobody")
        assert (await collect(served.generate([3], SamplingParams(max_tokens=1)))).finished

    run(test)


def test_refused_requests_leave_the_others_alone() -> None:
    async def test(served: AsyncEngine) -> None:
        good = asyncio.ensure_future(collect(served.generate([1], SamplingParams(max_tokens=30))))
        for prompt in ([], [VOCAB], [1] * 64, "text"):
            with pytest.raises(RequestError):
                await collect(served.generate(prompt))
        held = served.generate([1], None, "same")
        await anext(held)
        with pytest.raises(RequestError, match="in use"):
            await collect(served.generate([1], None, "same"))
        assert (await anext(held)).request_id == "same"
        assert (await good).outputs[0].token_ids == alone([1], SamplingParams(max_tokens=30))

    run(test)


def test_full_queue_is_refused() -> None:
    async def test(served: AsyncEngine) -> None:
        streams = [collect(served.generate([1, i])) for i in range(40)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert {type(r) for r in results} == {RequestOutput, CapacityError}

    run(test, make_engine(max_waiting=2))


def test_drain_takes_nothing_new_and_waits_for_the_rest() -> None:
    async def test(served: AsyncEngine) -> None:
        pending = asyncio.ensure_future(collect(served.generate([1])))
        await asyncio.sleep(0)
        drained = asyncio.ensure_future(served.drain())
        await asyncio.sleep(0)
        with pytest.raises(DrainingError, match="shutting down"):
            await collect(served.generate([2]))
        assert await drained
        assert (await pending).outputs[0].finish_reason == "length"

    run(test)


class Foresighted(Wrapped):
    """Has so many things to do ahead of steps; tells which call was which."""

    def __init__(self, inner: PagedModel, left: int) -> None:
        super().__init__(inner)
        self.left = left
        self.calls: list[str] = []

    def launch(self, step: Step) -> Running:
        self.calls.append("step")
        return self.inner.launch(step)

    def work_ahead(self, seconds: float) -> bool:
        time.sleep(0.002)
        self.calls.append("ahead")
        self.left -= 1
        return self.left > 0


def test_an_idle_engine_works_ahead_and_requests_do_not_wait_for_all_of_it() -> None:
    engine = make_engine()
    assert isinstance(engine.executor, PagedModel)
    executor = engine.executor = Foresighted(engine.executor, 1000)

    async def test(served: AsyncEngine) -> None:
        await collect(served.generate([1, 2], SamplingParams(max_tokens=4)))
        assert executor.left > 0
        first = executor.calls.index("step")
        assert executor.calls[first : first + 4] == ["step"] * 4
        executor.left = 3
        while executor.left > 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert executor.left == 0  # it waits for requests, and does not ask again

    run(test, engine)


class Failing(Wrapped):
    """Works for some steps, then fails."""

    def __init__(self, inner: PagedModel, steps: int) -> None:
        super().__init__(inner)
        self.steps = steps

    def launch(self, step: Step) -> Running:
        self.steps -= 1
        if self.steps < 0:
            raise MemoryError("no more memory")
        return self.inner.launch(step)


class Slow(Wrapped):
    """Takes its time for each step, so that others see what lies between two."""

    def launch(self, step: Step) -> Running:
        time.sleep(0.02)
        return self.inner.launch(step)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_dead_thread_fails_everybody_and_hangs_nobody(steps: int) -> None:
    engine = make_engine()
    assert isinstance(engine.executor, PagedModel)
    engine.executor = Failing(engine.executor, steps)

    async def test(served: AsyncEngine) -> None:
        streams = [collect(served.generate([1, i])) for i in range(20)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(r, InfcError) and "no more memory" in str(r) for r in results)
        assert not served.healthy
        assert isinstance(served.error, MemoryError)
        with pytest.raises(InfcError, match="no more memory"):
            await collect(served.generate([1]))
        assert await served.drain(1)

    served = AsyncEngine(engine)
    asyncio.run(asyncio.wait_for(test(served), 30))
    served.shutdown()


def test_shutdown_fails_what_is_pending() -> None:
    engine = make_engine()
    engine.plan = replace(engine.plan)

    async def test(served: AsyncEngine) -> None:
        streams = [asyncio.ensure_future(collect(served.generate([1, i]))) for i in range(20)]
        await asyncio.sleep(0)
        await asyncio.to_thread(served.shutdown)
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert any("shut down" in str(r) for r in results)
        assert all(isinstance(r, (RequestOutput, InfcError)) for r in results)

    run(test, engine)


def test_what_a_reader_leaves_is_kept_once_and_the_others_get_theirs() -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)

    async def test(served: AsyncEngine) -> None:
        reader = await served.read([[1, 2], [3]], params)
        others = await asyncio.gather(*(collect(served.generate([1, i], params)) for i in range(8)))
        assert all(len(other.outputs[0].token_ids) == 40 for other in others)
        while served.num_pending:
            await asyncio.sleep(0.001)
        assert len(reader.inbox) <= 4  # for each what came first, and its end
        parts: list[list[RequestOutput]] = [[], []]
        while reader.num_open:
            number, output = await reader.get()
            parts[number].append(output)
        reader.close()
        for prompt, each in zip(([1, 2], [3]), parts, strict=True):
            assert len(each) == 2
            assert merge_outputs(each).outputs[0].token_ids == alone(prompt, params)

    run(test)


def test_a_reader_that_goes_ends_all_of_its_requests() -> None:
    async def test(served: AsyncEngine) -> None:
        reader = await served.read([[1, 2], [3], [4]], SamplingParams(ignore_eos=True))
        number, output = await reader.get()
        assert number in (0, 1, 2) and not output.finished
        reader.close()
        reader.close()
        assert await served.drain(10)

    run(test)


def test_one_bad_prompt_begins_none() -> None:
    async def test(served: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="not a token id"):
            await served.read([[1, 2], [VOCAB]])
        assert served.num_pending == 0

    run(test)


def test_requests_of_a_reader_that_the_queue_refuses() -> None:
    async def test(served: AsyncEngine) -> None:
        reader = await served.read([[1, i] for i in range(40)], SamplingParams(max_tokens=20))

        async def read_all() -> None:
            while reader.num_open:
                await reader.get()

        with pytest.raises(CapacityError):
            await read_all()
        reader.close()
        assert await served.drain(10)

    run(test, make_engine(max_waiting=2))


@pytest.mark.parametrize("message", ["no more memory", "shut down"])
def test_what_a_reader_leaves_comes_before_the_error(message: str) -> None:
    params, prompts = SamplingParams(max_tokens=40, ignore_eos=True), ([1, 2], [3])
    engine = make_engine()
    assert isinstance(engine.executor, PagedModel)
    failing = message == "no more memory"
    engine.executor = Failing(engine.executor, 10) if failing else Slow(engine.executor)

    async def test(served: AsyncEngine) -> None:
        reader = await served.read(prompts, params)
        streams = [stream.request.stream for stream in served._pending]
        while served.num_pending:
            if message == "shut down" and all(stream.has_news for stream in streams):
                await asyncio.to_thread(served.shutdown)
            await asyncio.sleep(0)
        parts: list[list[RequestOutput]] = [[], []]
        errors = []
        while reader.num_open:
            try:
                number, output = await reader.get()
                parts[number].append(output)
            except InfcError as error:
                errors.append(str(error))
        reader.close()
        assert len(errors) == 2 and all(message in error for error in errors)
        for prompt, each in zip(prompts, parts, strict=True):
            assert len(each) == 2
            token_ids = merge_outputs(each).outputs[0].token_ids
            assert len(token_ids) > 1
            assert token_ids == alone(prompt, params)[: len(token_ids)]
            assert each[-1].outputs[0].finish_reason is None

    run(test, engine)


def test_an_end_that_was_read_is_followed_by_no_error() -> None:
    """Also where a patrol had seen that it was open, and found then that nothing more comes."""

    async def test(served: AsyncEngine) -> None:
        reader = await served.read([[1, 2]], SamplingParams(max_tokens=1))
        (stream,) = served._pending
        _, output = await reader.get()
        assert output.finished and reader.num_open == 0
        stream.fail(InfcError("late"))
        assert not reader.has_more
        reader.close()

    run(test)
