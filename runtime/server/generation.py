"""Prompts through the engine: all of a request's outputs in one stream, or gathered."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from ...ir.errors import CapacityError, DrainingError, InfcError, RequestError
from ..faults import is_fault, note_fault
from ..requests.outputs import RequestOutput
from .errors import ApiError

if TYPE_CHECKING:
    from ..sampling.sampling_params import SamplingParams
    from .service import Service

_LOG = logging.getLogger("infc.server")

Prompt = str | list[int]
Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
_Arrival = tuple[int, RequestOutput | Exception]


async def each_output(
    service: Service, prompts: Sequence[Prompt], params: SamplingParams
) -> Outputs:
    """What each step adds to each prompt, as (number of the prompt, output).

    Closing or cancelling it ends all of them, and so does the first that fails. Raises what
    the engine raises, and ApiError for an answer that was cut off or took too long.
    """
    if len(prompts) == 1:
        async with aclosing(_outputs(service, prompts[0], params)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    # One place a prompt: whoever is ahead waits until the client has read what there is.
    arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(len(prompts))
    pulls = [
        asyncio.create_task(_pull(service, index, prompt, params, arrivals))
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


async def gather_outputs(outputs: Outputs, count: int) -> list[list[RequestOutput]]:
    """What steps gave to each of `count` prompts, in their order."""
    parts: list[list[RequestOutput]] = [[] for _ in range(count)]
    async for index, output in outputs:
        parts[index].append(output)
    return parts


async def _pull(
    service: Service,
    index: int,
    prompt: Prompt,
    params: SamplingParams,
    arrivals: asyncio.Queue[_Arrival],
) -> None:
    try:
        async with aclosing(_outputs(service, prompt, params)) as outputs:
            async for output in outputs:
                await arrivals.put((index, output))
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError) or not is_fault(error):
            raise
        if not isinstance(error, Exception):  # a panic in the library of tokenizers
            note_fault("a prompt", error)
            message = "this prompt could not be read"
            error = ApiError(500, message, code="generation_failed")
        await arrivals.put((index, error))


async def _outputs(
    service: Service, prompt: Prompt, params: SamplingParams
) -> AsyncGenerator[RequestOutput, None]:
    engine, settings = service.engine, service.settings
    request_id = f"http-{secrets.token_hex(8)}"
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        engine.abort(request_id)

    timer = asyncio.get_running_loop().call_later(settings.request_seconds, expire)
    meter = service.metrics.meter()
    try:
        stream = engine.generate(prompt, params, request_id)
        async with aclosing(stream) as outputs:
            async for output in outputs:
                meter.add(output)
                if late and not output.finished:  # its time was over before the engine knew it
                    engine.abort(request_id)
                _check(output, late_seconds=settings.request_seconds if late else None)
                yield output
    except CapacityError as error:
        if isinstance(error, DrainingError) or not engine.healthy:
            raise  # coming again, here at least, is no use
        wait = service.metrics.retry_seconds()
        raise ApiError(429, str(error), code="queue_full", retry_seconds=wait) from None
    except InfcError as error:
        if isinstance(error, RequestError) or not engine.healthy:
            raise
        _LOG.error("a request failed: %s", error)  # it alone: the engine goes on
        message = "the step that this answer was in failed"
        raise ApiError(500, message, code="generation_failed") from None
    finally:
        timer.cancel()
        meter.close()


def _check(output: RequestOutput, late_seconds: float | None) -> None:
    reasons = {part.finish_reason for part in output.outputs}
    if "error" in reasons:
        raise ApiError(500, output.error or "the answer failed", code="generation_failed")
    if "abort" in reasons and late_seconds is not None:
        raise ApiError(504, f"the answer took more than {late_seconds:g} s", code="timeout")
    if "abort" in reasons:
        raise ApiError(503, "the answer was cut off", code="aborted")
