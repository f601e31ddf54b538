"""From checked prompts to an answer, whole or as a stream: what completions and chats share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from ...ir.errors import RequestError
from ..requests.outputs import RequestOutput, merge_outputs
from .encoding import encode_in_pieces
from .errors import ApiError
from .events import Events
from .generation import gather_outputs, open_outputs
from .jobs import SMALL, Job, width_of
from .request_log import RequestRecord
from .service import Service
from .streaming import WholeAnswer, open_event_stream
from .usage import Usage, answer_head


async def answer(service: Service, job: Job, record: RequestRecord) -> Response:
    """Runs the job, and tells `record`. Raises ApiError, and what the engine raises."""
    request, shape = job.request, job.shape
    kind = shape.chunk_kind if request.stream else shape.whole_kind
    head = answer_head(shape.prefix, kind, request.model)
    usage = Usage()
    record.answer_id, record.usage = head["id"], usage
    if not request.stream:
        body = await whole_answer(service, job, record, head, usage)
        return WholeAnswer(body, service.settings.stall_seconds)
    _check(service, job)
    outputs = await open_outputs(service, job.prompts, job.params, usage, record, whole=False)
    events = Events(service, outputs, head, job, usage)
    return await open_event_stream(events, service.settings.stall_seconds)


async def whole_answer(
    service: Service, job: Job, record: RequestRecord, head: dict[str, Any], usage: Usage
) -> list[bytes]:
    """The answer as JSON, in pieces, which begins with `head`. Raises what `answer` raises."""
    _check(service, job)
    outputs = await open_outputs(service, job.prompts, job.params, usage, record, whole=True)
    try:
        parts = await gather_outputs(outputs, len(job.prompts))
    finally:
        outputs.close()
    if usage.num_tokens * width_of(job) > SMALL:
        return await service.writers.run(_whole, parts, head, job, usage)
    return _whole(parts, head, job, usage)


def _whole(
    parts: Sequence[list[RequestOutput]], head: dict[str, Any], job: Job, usage: Usage
) -> list[bytes]:
    choices = (
        job.shape.whole(number * job.params.n + part.index, whole, part)
        for number, whole in enumerate(map(merge_outputs, parts))
        for part in whole.outputs
    )
    return encode_in_pieces(head, choices, usage=usage.as_json())


def _check(service: Service, job: Job) -> None:
    _check_choices(service, job)
    _check_logprobs(service, job)


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
