"""The routes that Amazon SageMaker calls: `/ping`, and `/invocations` for every kind of request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .answers import ChatAnswer, ChatChunk
from .bodies import BodyReader
from .chat import create_chat
from .completions import create_completion
from .openapi import body_of, generation_answers
from .protocol import ChatRequest, CompletionRequest
from .request_log import record_of
from .served import ServedEngine
from .service import Service


def add_ping(router: APIRouter, engine: ServedEngine) -> None:
    """`/ping`: whether the container takes requests. It is called within two seconds."""

    @router.get(
        "/ping", response_class=Response, responses={503: {"description": "It has stopped."}}
    )
    async def ping() -> Response:
        """200 while requests are answered."""
        return Response(status_code=200 if engine.healthy else 503)


def add_invocations(router: APIRouter, service: Service, bodies: BodyReader) -> None:
    """`/invocations`: a conversation if it has `messages`, else prompts.

    An endpoint serves one model, so `model` may be missing.
    """
    settings = service.settings

    def kind_of(fields: dict[str, Any]) -> type[ChatRequest] | type[CompletionRequest]:
        if fields.get("model") is None:
            fields["model"] = settings.model_name
        return ChatRequest if "messages" in fields else CompletionRequest

    @router.post(
        "/invocations",
        responses=generation_answers(ChatAnswer, ChatChunk),
        openapi_extra=body_of(ChatRequest, settings),
    )
    async def invocations(request: Request) -> Response:
        """Continues a conversation, or prompts: as the routes under `/v1` do."""
        async with bodies.read_as(request, kind_of) as body:
            record = record_of(request.scope)
            if isinstance(body, ChatRequest):
                return await create_chat(service, body, record)
            return await create_completion(service, body, record)
