"""`/v1/chat/completions`: a conversation to the assistant's next turn, whole or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

from ...ir.errors import RequestError
from ..requests.outputs import CompletionOutput, RequestOutput
from .answering import answer
from .encoding import Shared
from .errors import ApiError
from .jobs import Job
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatRequest
from .request_log import RequestRecord
from .service import Service


async def create_chat(service: Service, request: ChatRequest, record: RequestRecord) -> Response:
    """Answers one request, and tells `record`. Raises ApiError, and what the engine raises."""
    with naming_fields(request):
        job = await read_chat(service, request, record)
        return await answer(service, job, record)


@contextlib.contextmanager
def naming_fields(request: ChatRequest) -> Iterator[None]:
    """Within, a refused parameter is an ApiError, in the words of the request that it came from."""
    try:
        yield
    except RequestError as error:
        raise ApiError(400, str(error), param=_param(request, error.field)) from None


def _param(request: ChatRequest, field: str | None) -> str | None:
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return names.get(field, field) if field is not None else None


async def read_chat(service: Service, request: ChatRequest, record: RequestRecord) -> Job:
    """What the request is to become. Raises RequestError and ApiError."""
    num_logprobs = _num_logprobs(request)
    service.check_request(request, num_logprobs)
    params = request.sampling(
        service.settings.sampling_defaults,
        max_tokens=service.output_limit(_max_tokens(request), "max_tokens"),
        logprobs=num_logprobs,
    )
    messages = [message.for_template() for message in request.messages]
    record.prompt = messages
    token_ids = await service.encode_chat(messages)
    return Job(request, [token_ids], params, _Turns(service, request))


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
        raise ApiError(400, "top_logprobs requires logprobs: true", param="top_logprobs")
    return (top or 0) if request.logprobs else None


class _Turns:
    """Writes the choices: each is one next turn."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._texts = service.token_texts
        self._num_top = request.top_logprobs or 0
        self._num_prompt_top = request.prompt_logprobs
        self._of_prompt: dict[str, Any] = {}
        self.with_ids = service.wants_token_ids(request)

    def whole(self, index: int, output: RequestOutput, part: CompletionOutput) -> dict[str, Any]:
        """A choice of a whole answer."""
        message = {"role": "assistant", "content": part.text, "refusal": None}
        prompt = self._prompt(output)
        return {"index": index, "message": message, **self._rest(part), **prompt}

    def opening(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """Whose turn it is."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        rest = {"logprobs": None, "finish_reason": None, **self._prompt(output)}
        return {"index": index, "delta": delta, **rest}

    def chunk(self, index: int, part: CompletionOutput) -> dict[str, Any] | None:
        """What a step added to a choice."""
        if not (part.text or part.logprobs or part.finish_reason or self.with_ids):
            return None
        delta = {"content": part.text} if part.text or not part.finish_reason else {}
        return {"index": index, "delta": delta, **self._rest(part)}

    def _prompt(self, output: RequestOutput) -> dict[str, Any]:
        if self._num_prompt_top is not None and output.prompt_logprobs is not None:
            entries = prompt_logprobs(output.prompt_logprobs, self._texts, self._num_prompt_top)
            self._of_prompt = {"prompt_logprobs": Shared(entries)}  # with the first output alone
        return self._of_prompt

    def _rest(self, part: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if part.logprobs is not None:
            logprobs = chat_logprobs(part.logprobs, self._texts, self._num_top)
        rest = {"logprobs": logprobs, "finish_reason": part.finish_reason}
        return {**rest, "token_ids": part.token_ids} if self.with_ids else rest
