"""AsyncLLM: what LLM gives, for many tasks at once; slow readers, cancellation, and the end."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from infc.ir.errors import CapacityError, InfcError, RequestError, UsageError
from infc.runtime.api.async_llm import AsyncLLM
from infc.runtime.api.llm import LLM
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

from .small_artifact import write_small_artifact

PROMPTS: list[str | list[int]] = ["the cat", "the hat sat on the mat and the cat", "the", [5, 6, 7]]
LONG = SamplingParams(max_tokens=80, ignore_eos=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("async") / "small")


def run(artifact: Path, test: Callable[[AsyncLLM], Awaitable[None]], **limits: Any) -> None:
    """Run a test in a loop; afterwards every block is free again, and the thread has ended."""

    async def guarded() -> AsyncLLM:
        async with AsyncLLM(artifact, **limits) as llm:
            await asyncio.wait_for(test(llm), 60)
            assert await llm.drain(10)
            stats = llm.stats()
            assert stats.num_free_blocks == stats.num_blocks
        return llm

    assert not asyncio.run(guarded()).engine.healthy


async def collect(llm: AsyncLLM, *args: Any, **kwargs: Any) -> RequestOutput:
    return merge_outputs([output async for output in llm.generate(*args, **kwargs)])


def test_many_tasks_each_get_what_they_get_alone(artifact: Path) -> None:
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=9) for i in range(4)]
    chat = [{"role": "user", "content": "the hat"}]
    with LLM(artifact) as alone:
        expected = [alone.generate(*case)[0].outputs for case in zip(PROMPTS, params, strict=True)]
        expected.append(alone.chat(chat, params[0]).outputs)

    async def test(llm: AsyncLLM) -> None:
        async def talk() -> RequestOutput:
            return merge_outputs([part async for part in llm.chat(chat, params[0])])

        cases = (collect(llm, *case) for case in zip(PROMPTS, params, strict=True))
        answers = await asyncio.gather(*cases, talk())
        assert [answer.outputs for answer in answers] == expected

    run(artifact, test)


def test_parts_add_up_and_cumulative_outputs_grow(artifact: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        whole = await collect(llm, "the cat", LONG)
        grown = [o async for o in llm.generate("the cat", sampling_params=LONG, cumulative=True)]
        assert len(grown) > 1
        for shorter, longer in pairwise(grown):
            assert longer.outputs[0].text.startswith(shorter.outputs[0].text)
            assert len(longer.outputs[0].token_ids) > len(shorter.outputs[0].token_ids)
        assert grown[-1].outputs == whole.outputs
        assert [o.finished for o in grown] == [False] * (len(grown) - 1) + [True]

    run(artifact, test)


def test_a_slow_reader_gets_everything_in_few_parts(artifact: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        expected = await collect(llm, "the cat", LONG)
        parts = []
        async for part in llm.generate("the cat", LONG):
            parts.append(part)
            if len(parts) == 1:
                while llm.stats().num_running or llm.engine.num_pending:
                    await asyncio.sleep(0.01)
        assert len(parts) <= 3 < len(expected.outputs[0].token_ids)
        assert merge_outputs(parts).outputs == expected.outputs

    run(artifact, test)


def test_closing_and_cancelling_end_the_request(artifact: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        async with aclosing(llm.generate("the cat", LONG)) as stream:
            async for _ in stream:
                break
        async for _ in llm.generate("the cat", LONG):
            break  # not closed by name: the loop's own clean-up does it
        task = asyncio.ensure_future(collect(llm, "the hat", LONG))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while llm.engine.num_pending:
            await asyncio.sleep(0.01)

    run(artifact, test)


def test_refusals_reach_the_caller_and_nobody_else(artifact: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        good = asyncio.ensure_future(collect(llm, "the cat", LONG))
        with pytest.raises(RequestError, match="not a token id"):
            await collect(llm, [10**6])
        with pytest.raises(RequestError, match="the prompt has 96 tokens"):
            await collect(llm, [1] * 96)
        with pytest.raises(RequestError, match="are the same: pass only one"):
            await collect(llm, "the", LONG, sampling_params=LONG)
        with pytest.raises(RequestError, match="params must be SamplingParams"):
            await collect(llm, "the", {"max_tokens": 3})
        with pytest.raises(RequestError, match="has no role"):
            async for _ in llm.chat([{"content": "a"}]):
                pass
        assert (await good).outputs[0].finish_reason == "length"

    run(artifact, test)


def test_a_full_queue_is_said_at_once(artifact: Path) -> None:
    async def test(llm: AsyncLLM) -> None:
        tasks = [asyncio.ensure_future(collect(llm, "the cat", LONG)) for _ in range(12)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, CapacityError)]
        assert 1 <= len(refused) <= 10
        assert sum(isinstance(r, RequestOutput) for r in results) == 12 - len(refused)

    run(artifact, test, max_waiting=2, max_sequences=1)


def test_after_the_end(artifact: Path) -> None:
    async def use() -> None:
        async with AsyncLLM(artifact) as llm:
            stream = llm.generate("the cat", LONG)
            await anext(stream)
        with pytest.raises(InfcError, match="the engine was shut down"):
            [part async for part in stream]
        await llm.close()
        for late in (llm.generate("the"), llm.chat([{"role": "user", "content": "a"}])):
            with pytest.raises(InfcError, match="this AsyncLLM is closed"):
                await anext(late)

    asyncio.run(use())


def test_one_that_nobody_closes_ends_with_its_last_reference(artifact: Path) -> None:
    async def use() -> threading.Thread:
        llm = AsyncLLM(artifact)
        await collect(llm, "the cat", LONG)
        return next(t for t in threading.enumerate() if t.name == "infc-engine")

    thread = asyncio.run(use())
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_limits_and_notes_are_those_of_llm(artifact: Path) -> None:
    with pytest.raises(UsageError, match="has no option 'max_contxt'"):
        AsyncLLM(artifact, max_contxt=10)
    with pytest.warns(UserWarning, match="max_context is reduced to") as caught:
        asyncio.run(AsyncLLM(artifact, kv_memory="10KiB").close())
    assert caught[0].filename == __file__


def test_every_call_has_a_priority_and_a_salt(artifact: Path) -> None:
    text = "the hat sat on the mat and the cat sat on the hat and the mat sat on the cat"
    chat = [{"role": "user", "content": text}]

    async def test(llm: AsyncLLM) -> None:
        async def talk(**options: Any) -> int:
            parts = [part async for part in llm.chat(chat, SamplingParams(max_tokens=1), **options)]
            return parts[0].metrics.num_cached_tokens

        assert [await talk(cache_salt=salt) for salt in ("a", "b")] == [0, 0]
        assert await talk(cache_salt="a") > 0

        seen = []
        add = llm.engine.engine.prepare_reading

        def spy(request_id: str, *prompt: Any, **options: Any) -> Any:
            seen.append((options["priority"], options["cache_salt"]))
            return add(request_id, *prompt, **options)

        llm.engine.engine.prepare_reading = spy  # type: ignore[method-assign]
        await llm.score(text, priority=3, cache_salt="a")
        await llm.embed(text, priority=4, cache_salt="b")
        assert seen == [(3, "a"), (4, "b")]
        for call in (llm.score, llm.embed):
            with pytest.raises(RequestError, match="priority must be an integer"):
                await call(text, priority="high")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="priority must be an integer"):
            await talk(priority="high")

    run(artifact, test)
