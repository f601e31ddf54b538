"""The HTTP application: routes, and what surrounds them."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response

from .bodies import read_request
from .chat import create_chat
from .completions import create_completion
from .disconnect import CancelOnDisconnect
from .errors import ApiError, install_handlers
from .protocol import ChatRequest, CompletionRequest
from .request_log import RequestLog, record_of
from .service import Service
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine
    from ..tokenizer import Tokenizer


def create_app(
    engine: AsyncEngine, tokenizer: Tokenizer | None, settings: ServerSettings
) -> FastAPI:
    """The application that serves `engine`; `tokenizer` None takes and gives token ids only."""
    service = Service(engine, tokenizer, settings)
    app = FastAPI(title="infc", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(CancelOnDisconnect)
    if settings.log_requests:
        app.add_middleware(RequestLog)  # around the one before: it also tells of who went away
    install_handlers(app)
    router = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(settings.api_key))])
    _add_generation(router, service)
    _add_models(router, service)
    app.include_router(router)

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine lives, 503 once it does not."""
        if engine.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine has stopped"}, 503)

    return app


def _key_check(key: str | None) -> Callable[[Request], Awaitable[None]]:
    """Refuses a request without the key, before anything of it is read."""
    expected = None if key is None else f"Bearer {key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if expected is not None and not hmac.compare_digest(given, expected):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key"
            )

    return check


def _add_generation(router: APIRouter, service: Service) -> None:
    settings = service.settings

    @router.post("/completions", openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continues prompts."""
        body = await read_request(request, CompletionRequest, settings)
        return await create_completion(service, body, record_of(request.scope))

    @router.post("/chat/completions", openapi_extra=_body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Continues a conversation."""
        body = await read_request(request, ChatRequest, settings)
        return await create_chat(service, body, record_of(request.scope))


def _body_schema(kind: type[CompletionRequest] | type[ChatRequest]) -> dict[str, Any]:
    # The library would read and check the body itself, and answer 422 in a shape of its own.
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_models(router: APIRouter, service: Service) -> None:
    card = {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "infc",
        "max_model_len": service.max_context,
    }

    @router.get("/models")
    async def models() -> Response:
        """The one model served here."""
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        """The model of that name."""
        service.check_model(name)
        return JSONResponse(card)
