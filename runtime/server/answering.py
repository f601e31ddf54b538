"""From checked prompts to an answer, whole or as a stream: what completions and chats share."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from starlette.responses import JSONResponse, Response

from ..outputs import CompletionOutput, RequestOutput
from .errors import ApiError
from .generation import Outputs, Prompt, each_output, gather_outputs
from .protocol import GenerationRequest
from .request_log import RequestRecord
from .service import Service
from .streaming import Event, open_event_stream
from .usage import Usage, answer_head

if TYPE_CHECKING:
    from ..sampling_params import SamplingParams


class Shape(Protocol):
    """How one route writes its choices. `index` numbers the choices over all prompts."""

    prefix: str
    whole_kind: str
    chunk_kind: str

    def whole(self, index: int, output: RequestOutput, part: CompletionOutput) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def opening(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """What a stream says of a choice before its first tokens, if anything."""
        ...

    def chunk(self, index: int, part: CompletionOutput) -> dict[str, Any] | None:
        """What a step added to a choice; None where that is nothing to tell of."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One request, checked, and what it is to become."""

    request: GenerationRequest
    prompts: Sequence[Prompt]
    params: SamplingParams
    shape: Shape


async def answer(service: Service, job: Job, record: RequestRecord) -> Response:
    """Runs the job, and tells `record`. Raises ApiError, and what the engine raises."""
    request, shape = job.request, job.shape
    _check_choices(service, job)
    outputs = each_output(service, job.prompts, job.params)
    kind = shape.chunk_kind if request.stream else shape.whole_kind
    head = answer_head(shape.prefix, kind, request.model)
    usage = Usage()
    record.answer_id, record.usage = head["id"], usage
    watched = _watched(outputs, usage, record)
    if request.stream:
        events = _events(watched, head, job, usage)
        return await open_event_stream(events, service.settings.stall_seconds)
    async with aclosing(watched):
        answers = await gather_outputs(watched, len(job.prompts))
    choices = [
        shape.whole(number * job.params.n + part.index, whole, part)
        for number, whole in enumerate(answers)
        for part in whole.outputs
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage.as_json()})


def _check_choices(service: Service, job: Job) -> None:
    limit = service.settings.max_choices
    if (count := len(job.prompts) * job.params.num_choices) > limit:
        field = "n" if job.params.best_of is None else "best_of"
        raise ApiError(
            400,
            f"{len(job.prompts)} prompts with {field} {job.params.num_choices} are {count}"
            f" completions, and {limit} are the most",
            param=field if job.params.num_choices > 1 else "prompt",
        )


async def _watched(outputs: Outputs, usage: Usage, record: RequestRecord) -> Outputs:
    """The same outputs, counted on their way."""
    async with aclosing(outputs):
        async for number, output in outputs:
            usage.add(number, output)
            for part in output.outputs:
                if part.token_ids and record.first_token_time is None:
                    record.first_token_time = time.monotonic()
                if part.finish_reason is not None:
                    record.finish_reasons.append(part.finish_reason)
            yield number, output


async def _events(
    outputs: Outputs, head: dict[str, Any], job: Job, usage: Usage
) -> AsyncGenerator[Event, None]:
    chunk = {**head, "usage": None} if job.request.include_usage else head
    begun: set[int] = set()
    async with aclosing(outputs):
        async for number, output in outputs:
            for part in output.outputs:
                index = number * job.params.n + part.index
                if index not in begun:
                    begun.add(index)
                    if (opening := job.shape.opening(index, output)) is not None:
                        yield {**chunk, "choices": [opening]}
                if (choice := job.shape.chunk(index, part)) is not None:
                    yield {**chunk, "choices": [choice]}
    if job.request.include_usage:
        yield {**head, "choices": [], "usage": usage.as_json()}
