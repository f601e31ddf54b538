"""`/v1/completions`: prompts of text or token ids to text, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from ...ir.errors import RequestError
from ..outputs import CompletionOutput, RequestOutput
from .generation import Prompt, each_output, gather_outputs
from .logprobs import completion_logprobs
from .protocol import CompletionRequest
from .request_log import RequestRecord
from .service import Service
from .streaming import Event, open_event_stream
from .usage import Usage, answer_head

_DEFAULT_MAX_TOKENS = 16  # as OpenAI's API has it


async def create_completion(
    service: Service, request: CompletionRequest, record: RequestRecord
) -> Response:
    """Answers one request, and tells `record`.

    Raises RequestError, ApiError, and what the engine raises.
    """
    service.check_model(request.model)
    prompts = parse_prompts(request.prompt, service.settings.max_prompts)
    for prompt in prompts:
        service.check_length(prompt, "prompt")
    params = request.sampling(
        service.settings.sampling_defaults,
        max_tokens=_DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
    )
    outputs = each_output(service.engine, prompts, params)
    head = answer_head("cmpl", "text_completion", service.settings.model_name)
    shape = _Choices(service, with_ids=service.wants_token_ids(request))
    usage = Usage()
    record.answer_id, record.usage = head["id"], usage
    if request.stream:
        events = _events(outputs, head, shape, usage, include_usage=request.include_usage)
        return await open_event_stream(events, service.settings.stall_seconds)
    async with aclosing(outputs):
        answers = await gather_outputs(outputs, len(prompts))
    for index, answer in enumerate(answers):
        usage.add(index, answer)
    choices = [shape.choice(index, answer.outputs[0]) for index, answer in enumerate(answers)]
    return JSONResponse({**head, "choices": choices, "usage": usage.as_json()})


def parse_prompts(value: Any, limit: int) -> list[Prompt]:
    """One prompt or many: text, token ids, or a list of either; at most `limit` of them."""
    is_list = isinstance(value, list)
    if is_list and not value:
        raise RequestError("prompt is empty", field="prompt")
    # The first one tells; the others are looked at once it is known that they are not too many.
    is_many = is_list and type(value[0]) is not int
    prompts = value if is_many else [value]
    if len(prompts) > limit:
        raise RequestError(
            f"prompt holds {len(prompts)} prompts, and {limit} are the most", field="prompt"
        )
    for index, prompt in enumerate(prompts):
        name = f"prompt[{index}]" if is_many else "prompt"
        if not isinstance(prompt, (str, list)):
            raise RequestError(f"{name} must be text or a list of token ids", field="prompt")
        if not prompt:
            raise RequestError(f"{name} is empty", field="prompt")
        if type(prompt) is not type(prompts[0]):
            raise RequestError("prompt mixes text and token ids", field="prompt")
    return prompts


class _Choices:
    """Writes choices, and remembers how far the text of each has come."""

    def __init__(self, service: Service, *, with_ids: bool) -> None:
        self.with_ids = with_ids
        self._texts = service.token_texts
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        """`choices[]` of an answer, or of a chunk."""
        logprobs = None
        if output.logprobs is not None:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(output.logprobs, self._texts, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        choice = {
            "index": index,
            "text": output.text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }
        return {**choice, "token_ids": output.token_ids} if self.with_ids else choice


async def _events(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None],
    head: dict[str, Any],
    shape: _Choices,
    usage: Usage,
    *,
    include_usage: bool,
) -> AsyncGenerator[Event, None]:
    chunk = {**head, "usage": None} if include_usage else head
    async with aclosing(outputs):
        async for index, output in outputs:
            usage.add(index, output)
            part = output.outputs[0]
            if part.text or part.logprobs or part.finish_reason or shape.with_ids:
                yield {**chunk, "choices": [shape.choice(index, part)]}
    if include_usage:
        yield {**head, "choices": [], "usage": usage.as_json()}
