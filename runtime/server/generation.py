"""Prompts through the engine: all of a request's outputs in one stream, or gathered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from ..outputs import RequestOutput, merge_outputs
from .errors import ApiError

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine
    from ..sampling_params import SamplingParams

Prompt = str | list[int]
_Arrival = tuple[int, RequestOutput | Exception]


async def each_output(
    engine: AsyncEngine, prompts: Sequence[Prompt], params: SamplingParams
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """What each step adds to each prompt, as (number of the prompt, output).

    Closing or cancelling it ends all of them, and so does the first that fails. Raises what
    the engine raises, and ApiError for an answer that was cut off.
    """
    if len(prompts) == 1:
        async with aclosing(_outputs(engine, prompts[0], params)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    # One place a prompt: whoever is ahead waits until the client has read what there is.
    arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(len(prompts))
    pulls = [
        asyncio.create_task(_pull(engine, index, prompt, params, arrivals))
        for index, prompt in enumerate(prompts)
    ]
    left = len(prompts)
    try:
        while left:
            index, arrival = await arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            left -= arrival.finished
            yield index, arrival
    finally:
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)


async def gather_outputs(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None], count: int
) -> list[RequestOutput]:
    """The whole answer to each of `count` prompts, in their order."""
    parts: list[list[RequestOutput]] = [[] for _ in range(count)]
    async for index, output in outputs:
        parts[index].append(output)
    return [merge_outputs(part) for part in parts]


async def _pull(
    engine: AsyncEngine,
    index: int,
    prompt: Prompt,
    params: SamplingParams,
    arrivals: asyncio.Queue[_Arrival],
) -> None:
    try:
        async with aclosing(_outputs(engine, prompt, params)) as outputs:
            async for output in outputs:
                await arrivals.put((index, output))
    except Exception as error:
        await arrivals.put((index, error))


async def _outputs(
    engine: AsyncEngine, prompt: Prompt, params: SamplingParams
) -> AsyncGenerator[RequestOutput, None]:
    async with aclosing(engine.generate(prompt, params)) as outputs:
        async for output in outputs:
            reason = output.outputs[0].finish_reason
            if reason == "error":
                raise ApiError(500, output.error or "the answer failed", code="generation_failed")
            if reason == "abort":
                raise ApiError(503, "the answer was cut off", code="aborted")
            yield output
