"""`/v1/chat/completions`: a conversation to the assistant's next turn, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from ...ir.errors import RequestError
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import MAX_LOGPROBS
from .errors import ApiError
from .generation import each_output, gather_outputs
from .logprobs import TokenTexts, chat_logprobs
from .protocol import ChatRequest
from .request_log import RequestRecord
from .service import Service
from .streaming import Event, open_event_stream
from .usage import Usage, answer_head


async def create_chat(service: Service, request: ChatRequest, record: RequestRecord) -> Response:
    """Answers one request, and tells `record`. Raises ApiError, and what the engine raises."""
    service.check_model(request.model)
    try:
        return await _answer(service, request, record)
    except RequestError as error:  # in the words of the request that it came from
        raise ApiError(400, str(error), param=_param(request, error.field)) from None


def _param(request: ChatRequest, field: str | None) -> str | None:
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return names.get(field, field) if field is not None else None


async def _answer(service: Service, request: ChatRequest, record: RequestRecord) -> Response:
    params = request.sampling(
        service.settings.sampling_defaults,
        max_tokens=_max_tokens(request),
        logprobs=_num_logprobs(request),
    )
    token_ids = await service.encode_chat([m.for_template() for m in request.messages])
    outputs = each_output(service.engine, [token_ids], params)
    model = service.settings.model_name
    with_ids = service.wants_token_ids(request)
    shape = _Turn(service.token_texts, request.top_logprobs or 0, with_ids=with_ids)
    kind = "chat.completion.chunk" if request.stream else "chat.completion"
    head = answer_head("chatcmpl", kind, model)
    usage = Usage()
    record.answer_id, record.usage = head["id"], usage
    if request.stream:
        events = _events(outputs, head, shape, usage, include_usage=request.include_usage)
        return await open_event_stream(events, service.settings.stall_seconds)
    async with aclosing(outputs):
        (answer,) = await gather_outputs(outputs, 1)
    usage.add(0, answer)
    choices = [shape.choice(answer.outputs[0])]
    return JSONResponse({**head, "choices": choices, "usage": usage.as_json()})


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) contradict each other",
            field="max_tokens",
        )
    return old if new is None else new


def _num_logprobs(request: ChatRequest) -> int | None:
    top = request.top_logprobs
    if top is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise ApiError(
            400, f"top_logprobs is {top}, outside 0..{MAX_LOGPROBS}", param="top_logprobs"
        )
    return (top or 0) if request.logprobs else None


class _Turn:
    """Writes the one choice of an answer or of a chunk."""

    def __init__(self, texts: TokenTexts, num_top: int, *, with_ids: bool) -> None:
        self.with_ids = with_ids
        self._texts = texts
        self._num_top = num_top

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        """`choices[0]` of a whole answer."""
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": 0, "message": message, **self._rest(output)}

    def first(self) -> dict[str, Any]:
        """`choices[0]` of the first chunk."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, output: CompletionOutput) -> dict[str, Any]:
        """`choices[0]` of the chunks after it."""
        text = {"content": output.text} if output.text or not output.finish_reason else {}
        return {"index": 0, "delta": text, **self._rest(output)}

    def _rest(self, output: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if output.logprobs is not None:
            logprobs = chat_logprobs(output.logprobs, self._texts, self._num_top)
        rest = {"logprobs": logprobs, "finish_reason": output.finish_reason}
        return {**rest, "token_ids": output.token_ids} if self.with_ids else rest


async def _events(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None],
    head: dict[str, Any],
    shape: _Turn,
    usage: Usage,
    *,
    include_usage: bool,
) -> AsyncGenerator[Event, None]:
    chunk = {**head, "usage": None} if include_usage else head
    begun = False
    async with aclosing(outputs):
        async for _, output in outputs:
            usage.add(0, output)
            if not begun:
                begun = True
                yield {**chunk, "choices": [shape.first()]}
            part = output.outputs[0]
            if part.text or part.logprobs or part.finish_reason or shape.with_ids:
                yield {**chunk, "choices": [shape.delta(part)]}
    if include_usage:
        yield {**head, "choices": [], "usage": usage.as_json()}
