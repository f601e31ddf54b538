"""The HTTP application: routes, and what surrounds them."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.security import HTTPBearer
from starlette.responses import JSONResponse, Response

from .answers import (
    CertifiedModel,
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    Health,
    ModelList,
    Version,
)
from .bodies import BodyReader
from .chat import create_chat
from .completions import create_completion
from .disconnect import CancelOnDisconnect
from .errors import ApiError, install_handlers
from .metrics import ServerMetrics
from .openapi import answers, body_of, error, generation_answers
from .protocol import ChatRequest, CompletionRequest
from .request_log import RequestLog, record_of
from .sagemaker import add_invocations, add_ping
from .served import ServedEngine
from .service import Service
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


def create_app(
    engine: ServedEngine,
    tokenizer: Tokenizer | None,
    settings: ServerSettings,
    *,
    backend: str = "unknown",
    certificate: dict[str, Any] | None = None,
    metrics: ServerMetrics | None = None,
) -> FastAPI:
    """The application that serves `engine`; `tokenizer` None takes and gives token ids only.

    `backend` is what `/version` and `/metrics` call what executes the model, `certificate` what
    `/v1/models/NAME` says of its accuracy. `metrics` are those of the application before this one,
    which then `follow` its engine.
    """
    # The face has it too, and reaches every room: a server stands on ir alone.
    own = metadata.version("infc")
    version = {"version": own, "backend": backend}
    if metrics is None:
        metrics = ServerMetrics(engine, metrics_info(settings, backend))
    service = Service(engine, tokenizer, settings, metrics)
    app = FastAPI(
        title="infc",
        version=own,
        description=f"The model {settings.model_name} behind OpenAI's API.",
        openapi_url=None,  # made by a route of our own, beside the event loop
        redirect_slashes=False,
    )
    app.add_middleware(CancelOnDisconnect)
    # Around the one before: it also tells of who went away.
    app.add_middleware(RequestLog, settings=settings, metrics=metrics)
    install_handlers(app)
    with_key = [Depends(_key_check(settings.api_key))]
    if settings.api_key is not None:  # so that the description says it; it refuses nothing
        with_key.append(Depends(HTTPBearer(auto_error=False)))
    router = APIRouter(prefix="/v1", dependencies=with_key)
    bodies = BodyReader(settings, service.workers, service.max_context)
    _add_generation(router, service, bodies)
    _add_models(router, service, certificate)
    app.include_router(router)
    open_to_all = APIRouter()
    _add_health(open_to_all, engine)
    _add_description(open_to_all, app, service)
    guarded = APIRouter(dependencies=with_key)
    _add_version(guarded, version)
    _add_metrics(open_to_all if settings.open_metrics else guarded, metrics)
    if settings.sagemaker:
        add_ping(open_to_all, engine)
        add_invocations(guarded, service, bodies)
    app.include_router(open_to_all)
    app.include_router(guarded)
    return app


def metrics_info(settings: ServerSettings, backend: str) -> dict[str, str]:
    """What `/metrics` calls what is served."""
    version = metadata.version("infc")
    return {"version": version, "backend": backend, "model_name": settings.model_name}


def _key_check(key: str | None) -> Callable[[Request], Awaitable[None]]:
    """Refuses a request without the key, before anything of it is read."""
    expected = None if key is None else key.encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        scheme, _, credentials = given.partition(b" ")
        if expected is not None and not (
            # Compared in any case, so that the time says nothing of either.
            hmac.compare_digest(credentials.strip(b" "), expected) and scheme.lower() == b"bearer"
        ):
            raise ApiError(
                401,
                "a valid API key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    return check


def _add_generation(router: APIRouter, service: Service, bodies: BodyReader) -> None:
    settings = service.settings

    @router.post(
        "/completions",
        responses=generation_answers(CompletionAnswer, CompletionChunk),
        openapi_extra=body_of(CompletionRequest, settings),
    )
    async def completions(request: Request) -> Response:
        """Continues prompts."""
        async with bodies.read(request, CompletionRequest) as body:
            return await create_completion(service, body, record_of(request.scope))

    @router.post(
        "/chat/completions",
        responses=generation_answers(ChatAnswer, ChatChunk),
        openapi_extra=body_of(ChatRequest, settings),
    )
    async def chat_completions(request: Request) -> Response:
        """Continues a conversation."""
        async with bodies.read(request, ChatRequest) as body:
            return await create_chat(service, body, record_of(request.scope))


def _add_models(router: APIRouter, service: Service, certificate: dict[str, Any] | None) -> None:
    created, names = int(time.time()), list(service.settings.model_names)
    in_path: Any = Path(examples=names)

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "infc",
            "max_model_len": service.max_context,
        }

    @router.get("/models", responses=answers(ModelList, 401))
    async def models() -> Response:
        """The one model served here, by each of its names."""
        cards = [card(name) for name in names]
        return JSONResponse({"object": "list", "data": cards})

    @router.get("/models/{name:path}", responses=answers(CertifiedModel, 401, 404))
    async def model(name: str = in_path) -> Response:
        """The model of that name, with the certificate that was made when it was compiled."""
        service.check_model(name)
        return JSONResponse({**card(name), "certificate": certificate})


def _add_health(router: APIRouter, engine: ServedEngine) -> None:
    @router.get("/health", responses={**answers(Health), 503: {"model": Health}})
    async def health() -> Response:
        """200 while the engine lives, or a replica is to be started again; 503 otherwise."""
        body: dict[str, Any] = {"status": "ok" if engine.healthy else "the engine has stopped"}
        if replicas := engine.replicas():
            body["replicas"] = [
                {"state": each.state, "restarts": each.num_restarts} for each in replicas
            ]
        return JSONResponse(body, 200 if engine.healthy else 503)


def _add_description(router: APIRouter, app: FastAPI, service: Service) -> None:
    @router.get("/openapi.json", include_in_schema=False)
    async def describe() -> Response:
        return JSONResponse(await service.workers.run(app.openapi))

    @router.get("/docs", include_in_schema=False)
    async def show_description() -> Response:
        return get_swagger_ui_html(openapi_url="openapi.json", title=app.title)


def _add_version(router: APIRouter, version: dict[str, str]) -> None:
    @router.get("/version", responses=answers(Version, 401))
    async def show_version() -> Response:
        """What serves."""
        return JSONResponse(version)


def _add_metrics(router: APIRouter, metrics: ServerMetrics) -> None:
    page = {"text/plain": {"schema": {"type": "string"}}}
    page["application/openmetrics-text"] = page["text/plain"]

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": page, "description": "Metrics."}, 401: error(401)},
    )
    async def show_metrics(request: Request) -> Response:
        """Counts and times, as Prometheus reads them."""
        body, media = metrics.scrape(request.headers.get("accept", ""))
        return Response(body, media_type=media)
