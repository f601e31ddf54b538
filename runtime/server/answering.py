"""From checked prompts to an answer, whole or as a stream: what completions and chats share."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from starlette.responses import Response

from ...ir.errors import RequestError
from ..requests.outputs import CompletionOutput, RequestOutput, merge_outputs
from .encoding import encode, encode_in_pieces
from .errors import ApiError
from .generation import Outputs, Prompt, each_output, gather_outputs
from .protocol import GenerationRequest
from .request_log import RequestRecord
from .service import Service
from .streaming import Event, WholeAnswer, open_event_stream
from .usage import Usage, answer_head

if TYPE_CHECKING:
    from ..sampling.sampling_params import SamplingParams

_SMALL = 2048  # values of an answer that are written in no time


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
    _check_logprobs(service, job)
    outputs = each_output(service, job.prompts, job.params)
    kind = shape.chunk_kind if request.stream else shape.whole_kind
    head = answer_head(shape.prefix, kind, request.model)
    usage = Usage()
    record.answer_id, record.usage = head["id"], usage
    watched = _watched(outputs, usage, record)
    if request.stream:
        events = _events(service, watched, head, job, usage)
        return await open_event_stream(events, service.settings.stall_seconds)
    async with aclosing(watched):
        parts = await gather_outputs(watched, len(job.prompts))
    if usage.num_tokens * _width(job) > _SMALL:
        body = await service.writers.run(_whole, parts, head, job, usage)
    else:
        body = _whole(parts, head, job, usage)
    return WholeAnswer(body, service.settings.stall_seconds)


def _whole(
    parts: Sequence[list[RequestOutput]], head: dict[str, Any], job: Job, usage: Usage
) -> list[bytes]:
    """The answer as JSON, in pieces."""
    choices = (
        job.shape.whole(number * job.params.n + part.index, whole, part)
        for number, whole in enumerate(map(merge_outputs, parts))
        for part in whole.outputs
    )
    return encode_in_pieces(head, choices, usage=usage.as_json())


def _width(job: Job) -> int:
    """How many values there may be in an answer for each token."""
    asked = (job.params.logprobs, job.params.prompt_logprobs)
    return 1 + sum(1 + count for count in asked if count is not None)


def _check_choices(service: Service, job: Job) -> None:
    limit = service.settings.max_choices
    if (count := len(job.prompts) * job.params.num_choices) > limit:
        field = "n" if job.params.best_of is None else "best_of"
        raise ApiError(
            400,
            f"{len(job.prompts)} prompts with {field} {job.params.num_choices} are {count}"
            f" completions, the maximum is {limit}",
            param=field if job.params.num_choices > 1 else "prompt",
        )


def _check_logprobs(service: Service, job: Job) -> None:
    """Refuses more than an answer may hold, counted before any is computed.

    A stream gives those of its tokens as they come; those of prompts it has at once.
    """
    params, limit = job.params, service.settings.max_logprob_entries
    lengths = [len(prompt) for prompt in job.prompts]
    of_prompts = of_answers = 0
    if params.prompt_logprobs is not None:
        of_prompts = params.n * (1 + params.prompt_logprobs) * sum(lengths)
    if params.logprobs is not None and not job.request.stream:
        rest = (service.max_context - length for length in lengths)
        most = sum(
            left if params.max_tokens is None else min(left, params.max_tokens) for left in rest
        )
        of_answers = params.num_choices * (1 + params.logprobs) * most
    if of_prompts + of_answers > limit:
        field = "prompt_logprobs" if of_prompts > of_answers else "logprobs"
        raise RequestError(
            f"{field}: the answer could hold {of_prompts + of_answers} log-probabilities, the"
            f" maximum is {limit}",
            field=field,
            hint="request fewer of them, fewer completions, or a smaller max_tokens",
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
    service: Service, outputs: Outputs, head: dict[str, Any], job: Job, usage: Usage
) -> AsyncGenerator[Event, None]:
    chunk = {**head, "usage": None} if job.request.include_usage else head
    begun: set[int] = set()

    async def write(
        choose: Callable[[], dict[str, Any] | None], num_tokens: int, *, opens: bool = False
    ) -> Event | None:
        """An event with what `choose` gives, made beside the event loop where that takes long."""

        def pieces() -> Event | None:
            if (choice := choose()) is None:
                return None
            if long or (opens and job.params.prompt_logprobs is not None):
                return encode_in_pieces(chunk, [choice])
            return [encode({**chunk, "choices": [choice]})]

        long = num_tokens * _width(job) > _SMALL
        return await service.writers.run(pieces) if long else pieces()

    async with aclosing(outputs):
        async for number, output in outputs:
            num_rows = len(output.prompt_logprobs or ())
            if getattr(job.request, "echo", False):  # token ids are decoded then
                num_rows = len(output.prompt_token_ids)
            for part in output.outputs:
                index = number * job.params.n + part.index
                if index not in begun:
                    begun.add(index)
                    opening = partial(job.shape.opening, index, output)
                    if event := await write(opening, num_rows, opens=True):
                        yield event
                if event := await write(partial(job.shape.chunk, index, part), len(part.token_ids)):
                    yield event
    if job.request.include_usage:
        yield [encode({**head, "choices": [], "usage": usage.as_json()})]
